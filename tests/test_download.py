"""Tests of tools/download.py: only the known content is installed, and nothing else is left."""

import hashlib
import io
import shutil
import zipfile
from pathlib import Path

import pytest
from conftest import corruptions

import data as data_script
from common import SPLITS, UserError
from tools import download as d

FILES = {}  # path below the data folder → content
for split in SPLITS:
    for i in (1, 2):
        name = f"000001_square_red_00000{i}.png"
        FILES[f"{split}/image/{name}"] = f"image {i} of {split}".encode()
        FILES[f"{split}/gt_image/gt_{name}"] = f"mask {i} of {split}".encode()


def archive(path: Path, files: dict[str, bytes], prefix: str = "repo-1/data/") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("repo-1/README.md", "not data")
        for name, content in files.items():
            opened.writestr(prefix + name, content)
    return path


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> str:
    """Make the digest of `FILES` the expected one: lines as sha256sum writes them, by path."""
    lines = ""
    for name in sorted(FILES):
        lines += f"{hashlib.sha256(FILES[name]).hexdigest()}  {name}\n"
    digest = hashlib.sha256(lines.encode()).hexdigest()
    monkeypatch.setattr(d, "DIGESTS", {digest: "test"})
    return digest


def content(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*.*")}


def test_archive_is_installed_from_file_and_network(tmp_path: Path, known, monkeypatch):
    path = archive(tmp_path / "a.zip", FILES)
    assert d.download(tmp_path / "out", path) == known
    monkeypatch.setattr(d, "urlopen", lambda url, timeout: io.BytesIO(path.read_bytes()))
    assert d.download(tmp_path / "fetched") == known
    assert content(tmp_path / "out") == content(tmp_path / "fetched") == FILES
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip", "fetched", "out"]


FIRST = "training/image/000001_square_red_000001.png"


@pytest.mark.parametrize("new", [{"testing/image/x.png": b""}, {FIRST: b""}, {FIRST: bytes(9**6)}])
def test_other_content_is_refused(tmp_path: Path, new: dict[str, bytes]) -> None:
    with pytest.raises(UserError, match=r"a\.zip"):
        d.download(tmp_path / "out", archive(tmp_path / "a.zip", FILES | new))
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]


def test_paths_that_leave_the_folder_are_not_written(tmp_path: Path) -> None:
    files = dict(FILES)
    for name in ("../../a.png", "../../training/image/b.png", "/etc/c.png"):
        files[name] = b"x"
    path = archive(tmp_path / "a.zip", files, prefix="")
    with pytest.raises(UserError):  # b.png fits the known layout, so the content differs
        d.download(tmp_path / "in/out", path)
    assert content(tmp_path) == {"a.zip": path.read_bytes()}


def test_address_without_an_answer_is_one_line(tmp_path: Path, monkeypatch, call) -> None:
    monkeypatch.setattr(d, "URL", "https://localhost:9/archive.zip")
    code, _, error = call(data_script.main, "download", "--out", tmp_path / "out")
    assert code == 2 and error.count("\n") == 1
    assert "https://localhost:9/archive.zip" in error and "AFO_ARCHIVE" in error
    assert list(tmp_path.iterdir()) == []


def test_damaged_archive_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "b.zip"
    for data in corruptions(archive(tmp_path / "a.zip", FILES).read_bytes()):
        path.write_bytes(data)
        try:
            d.download(tmp_path / "out", path)
            assert content(tmp_path / "out") == FILES
            shutil.rmtree(tmp_path / "out")
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        assert {file.name for file in tmp_path.iterdir()} == {"a.zip", "b.zip"}
