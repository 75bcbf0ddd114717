"""Tests of tools/download.py: only the known content is installed, and nothing else is left."""

import hashlib
import io
import zipfile
from pathlib import Path

from common import UserError

import pytest
from conftest import corruptions

from tools import download as d

FILES = {
    f"{split}/{folder}/{prefix}000001_square_red_00000{i}.png": f"{split} {folder} {i}".encode()
    for split in ("training", "validation", "testing")
    for folder, prefix in (("image", ""), ("gt_image", "gt_"))
    for i in (1, 2)
}


def archive(path: Path, files: dict[str, bytes], prefix: str = "repo-1/data/") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("repo-1/README.md", "not data")
        for name, content in files.items():
            opened.writestr(prefix + name, content)
    return path


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> str:
    """Make the digest of `FILES` the expected one: lines as sha256sum writes them, by path."""
    lines = (f"{hashlib.sha256(FILES[n]).hexdigest()}  {n}\n" for n in sorted(FILES))
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()
    monkeypatch.setattr(d, "DIGESTS", {digest: "test"})
    return digest


def content(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_local_archive_is_installed(tmp_path: Path, known: str) -> None:
    assert d.download(tmp_path / "out", archive(tmp_path / "a.zip", FILES)) == known
    assert content(tmp_path / "out") == FILES
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip", "out"]


@pytest.mark.parametrize(
    "files",
    [
        FILES | {"training/image/000001_square_red_000003.png": b"one more"},
        dict(list(FILES.items())[1:]),
        FILES | {"training/image/000001_square_red_000001.png": b"another"},
        FILES | {"training/image/000001_square_red_000001.png": bytes(2 << 20)},
    ],
    ids=["more", "fewer", "changed", "huge"],
)
def test_other_content_is_refused(tmp_path: Path, files: dict[str, bytes]) -> None:
    with pytest.raises(UserError, match=r"a\.zip"):
        d.download(tmp_path / "out", archive(tmp_path / "a.zip", files))
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]


def test_paths_that_leave_the_folder_are_not_written(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    evil = {f"../../{name}.png": b"x" for name in ("a", "training/image/b")} | {"/etc/c.png": b"x"}
    path = archive(tmp_path / "in/a.zip", FILES | evil, prefix="")
    with pytest.raises(UserError):  # b.png is of the known layout, so that the content differs
        d.download(tmp_path / "in/out", path)
    assert content(tmp_path) == {"in/a.zip": path.read_bytes()}


def test_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    path = archive(tmp_path / "a.zip", FILES)
    (tmp_path / "out/mine.txt").write_text("keep")
    with pytest.raises(UserError, match="is there already"):
        d.download(tmp_path / "out", path)
    assert content(tmp_path / "out") == {"mine.txt": b"keep"}


def test_address_without_an_answer_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(d, "URL", "https://localhost:9/archive.zip")
    with pytest.raises(UserError, match=r"https://localhost:9/archive\.zip.*AFO_ARCHIVE"):
        d.download(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_download_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Response(io.BytesIO):
        length = None

    body = archive(tmp_path / "a.zip", FILES).read_bytes()
    monkeypatch.setattr(d, "urlopen", lambda url, timeout: Response(body))
    d.download(tmp_path / "out")
    assert content(tmp_path / "out") == FILES
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip", "out"]


def test_damaged_archive_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "b.zip"
    for data in corruptions(archive(tmp_path / "a.zip", FILES).read_bytes()):
        path.write_bytes(data)
        try:
            d.download(tmp_path / "out", path)
            assert content(tmp_path / "out") == FILES
            for file in sorted((tmp_path / "out").rglob("*"), reverse=True):
                file.unlink() if file.is_file() else file.rmdir()
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        assert not list(tmp_path.glob("*.partial"))
