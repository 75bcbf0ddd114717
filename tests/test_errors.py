"""How a script ends: what a user can mend, or the terminal cannot show, is never a stack trace."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from box import save
from conftest import ROOT, config_for

import predict
from data import load_split


def folder_without_a_number(path: Path) -> None:
    (path / "a").mkdir()
    (path / ("n" * 300)).stat()


@pytest.mark.parametrize(
    ("work", "says"),
    [
        (folder_without_a_number, "File name too long"),
        (lambda path: (path / "a/b").touch(), "a/b: No such file or directory"),
        (lambda path: torch.empty(2**55), "out of memory: lower batch_size or crop"),
        (lambda path: bytearray(2**60), "out of memory: lower batch_size or crop"),
    ],
)
def test_what_the_system_refuses_is_one_line(
    call: Callable, tmp_path: Path, work: Callable, says: str
) -> None:
    code, _, error = call(lambda: work(tmp_path))
    [line] = error.splitlines()
    assert code == 2 and line.startswith("error: ") and says in line


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("more than one element refers to a single memory location"),
        ValueError("x"),
        OSError("x"),
    ],
)
def test_mistakes_of_the_project_keep_their_trace(call: Callable, error: Exception) -> None:
    def main() -> None:
        raise error

    with pytest.raises(type(error)):
        call(main)


def test_names_that_the_terminal_has_no_letters_for(tmp_path: Path) -> None:
    """A file name that is no UTF-8 and one that is no ASCII, on a terminal of ASCII."""
    folder = tmp_path / "in"
    for name in (b"caf\xe9.png", "größe.png".encode()):
        save(folder / name.decode(errors="surrogateescape"), torch.full((16, 24, 3), 255).numpy())
    done = subprocess.run(
        [sys.executable, predict.__file__, folder, "--out", tmp_path / "out", "--device", "cpu"],
        env={"PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert rb"caf\udce9.png  24\xd716" in done.stdout and rb"gr\xf6\xdfe.png" in done.stdout
    assert len(list((tmp_path / "out").glob("*_mask.png"))) == 2


def test_data_with_names_that_are_not_utf8_are_cached(tmp_path: Path) -> None:
    name = b"caf\xe9_%d.png".decode(errors="surrogateescape")
    for i in range(4):
        for folder in ("image", "mask"):
            save(tmp_path / folder / (name % i), torch.zeros(8, 8, 3).byte().numpy())
    config = config_for(tmp_path, images="image/*.png", masks="mask/*.png", group="")
    assert len(load_split(config, "training").images) == 2


def test_a_reader_that_has_seen_enough(tmp_path: Path) -> None:
    """As in `python config.py … | head`, the pipe closed before anything is written."""
    process = subprocess.Popen(
        [sys.executable, "config.py", "--config", "configs/tuned.yaml"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 1


def test_standard_output_that_is_closed_or_full(tmp_path: Path) -> None:
    command = f"{sys.executable} config.py --config configs/tuned.yaml"
    for redirect, code in ((">/dev/full", 2), (">/dev/full 2>&-", 2)):
        done = subprocess.run(
            f"{command} {redirect}", shell=True, cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == code and "Traceback" not in done.stderr
        assert "2>" in redirect or done.stderr == (
            "error: standard output: No space left on device\n"
        )
    closed = subprocess.run(f"{command} --run-dir {tmp_path} >&-", shell=True, cwd=ROOT)
    assert closed.returncode == 0 and (tmp_path / "config.yaml").exists()


def test_a_model_too_large_for_the_memory(dataset: Path, tmp_path: Path, script: Callable) -> None:
    wide = ["encoder=[[1000000000000, 3]]", "decoder=[[4, 3]]", "skip=pooled", "images_per_epoch=8"]
    config = ["--config", "configs/tuned.yaml", "--run-dir", tmp_path / "run"]
    done = script("train.py", *config, "--data", dataset, "--set", *wide, "device=cpu")
    [line] = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("error: out of memory")
