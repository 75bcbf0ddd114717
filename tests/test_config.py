"""Tests of config.py and common.run: layers, the errors people make, and damaged files."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import corruptions

from common import ROOT, UserError, code_digest, write_atomically
from config import UNFINISHED, dump, load_config, main
from model import build_model, count_parameters
from pairs import check_data_keys

DEFAULT = yaml.safe_load((ROOT / "configs/default.yaml").read_text())
EXPERIMENTS = sorted({*(ROOT / "configs").rglob("*.yaml")} - {ROOT / "configs/allowed.yaml"})

CODE = '''\
"""Doc."""
import os  # a comment


def f(x: int, *names: str) -> str:
    """Doc."""
    if x > 1e-3:
        return f"{os.sep!r} and '{names[0]}' {x:>4}" + 'a"b'
    with open("a") as file, open("b"):
        return [name async for name in names] if False else {**{}, 1: (2,)}
'''


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_config_is_valid_and_read_back(path: Path, tmp_path: Path) -> None:
    config = load_config([path])
    assert config.keys() == DEFAULT.keys()
    check_data_keys(config)
    build_model(config)
    (tmp_path / "again.yaml").write_text(dump(config))
    assert load_config([tmp_path / "again.yaml"]) == config


def test_layers(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("epochs: 7\ncrop: 32\n")
    (tmp_path / "mine.yaml").write_text("base: base.yaml\ncrop: 40\n")
    (tmp_path / "over.yaml").write_text("batch_size: 8\n")
    config = load_config([tmp_path / "mine.yaml", tmp_path / "over.yaml"], ["dropout=1e-1"])
    expected = {"epochs": 7, "crop": 40, "batch_size": 8, "dropout": 0.1, "name": "mine"}
    assert config == DEFAULT | expected


def test_default_as_base_undoes_nothing_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(ROOT)
    (tmp_path / "mine.yaml").write_text("base: link/configs/default.yaml\nseed: 5\n")
    config = load_config([ROOT / "configs/best.yaml", tmp_path / "mine.yaml"])
    assert (config["skip"], config["crop"], config["seed"]) == ("full", 64, 5)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lerning_rate: 0.1", "unknown key 'lerning_rate'; did you mean 'learning_rate'"),
        ("epochs: many", "write it as in 'epochs: 15'"),
        ("epochs: 0", "epochs: is 0; allowed: 1 to"),
        ("epochs: true", "epochs: True;"),
        ("vertical_flip: 1.5", "vertical_flip: is 1.5; allowed: 0 to 1"),
        ("learning_rate: .nan", "learning_rate: nan;"),
        ("blur_sigma: [1, 2, 3]", "blur_sigma"),
        ("blur_kernel: 4", "blur_kernel: is 4"),
        ("skip: half", "skip: is half; allowed: ['pooled', 'full']"),
        ("images: a/*.png\nmasks: b/*.png", "group: the splits are drawn at random"),
        ("classes: {a: [0, 0, 0], a: [1, 1, 1]}", "a stands twice"),
        ("split_folders: train", "split_folders: 'train'"),
        ("focal: 1", "unknown key 'focal'; configs/default.yaml has all keys"),
        ("- a list", "cannot be read"),
        ("epochs:3", "cannot be read (it has other lines; does a space follow each colon?)"),
        ("base: [a, b]", "base: "),
        ("a: [", "cannot be read"),
        ("base: none.yaml", "none.yaml: cannot be read"),
        ("base: bad.yaml", "leads back"),
    ],
)
def test_mistakes_are_one_line_with_the_key(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config([path])
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_group_of_flights_does_not_hold_for_other_data(tmp_path: Path) -> None:
    assert load_config([ROOT / "configs/tuned.yaml"])["group"] == "^.{1,6}"
    mine = tmp_path / "mine.yaml"
    mine.write_text("images: '{split}/images/*.png'\nmasks: '{split}/masks/*.png'\n")
    assert load_config([ROOT / "configs/tuned.yaml", mine])["group"] == ""
    base = f"base: {ROOT / 'configs/tuned.yaml'}\n"  # the same keys in one file
    mine.write_text(base + mine.read_text())
    assert load_config([mine])["group"] == ""
    mine.write_text(mine.read_text() + "group: '^[^_]+'\n")
    assert load_config([mine])["group"] == "^[^_]+"
    assert load_config([ROOT / "configs/tuned.yaml", mine])["group"] == "^[^_]+"
    of_others = ["group=^a", "images='{split}/a/*.png'"]
    for overrides in (of_others, of_others[::-1]):
        assert load_config([ROOT / "configs/tuned.yaml"], overrides)["group"] == "^a"


def test_lab_protocol_flips_in_three_models_only() -> None:
    flips = {}
    for name in ("initial", "modified", "tuned", "augment/flip-0.5", "augment/blur-0.3", "final"):
        config = load_config([ROOT / f"configs/{name}.yaml"])
        assert config["last_batch"] == "keep"
        assert config["blur_masks"] == (config["blur"] > 0)
        flips[name] = config["horizontal_flip"]
    assert list(flips.values()) == [0.7, 0.7, 0.7, 0.0, 0.0, 0.0]
    quick = load_config([ROOT / "configs/tuned.yaml", ROOT / "configs/quick.yaml"])
    assert quick["horizontal_flip"] == 0.0


@pytest.mark.parametrize("text", ["loss={cross_entropy:", "loss={dice_pooled: 1, dice_pooled: 2}"])
def test_a_value_that_cannot_be_read_is_told_of_quotes(text: str) -> None:
    with pytest.raises(UserError, match=r"--set loss=.*SET=\"'loss={cross_entropy: 1}'\"$"):
        load_config([], [text])


def test_overrides_are_named(tmp_path: Path, call) -> None:
    mine, out = tmp_path / "mine.yaml", tmp_path / "out.yaml"
    mine.write_text("epochs: 30\ncrop: 48\ngroup: '^a'\n")
    last = tmp_path / "last.yaml"
    last.write_text("last_batch: keep\nepochs: 7\nimages: 'b/*'\ngroup: '^b'\n")
    files = ("--config", mine, ROOT / "configs/quick.yaml", last, "--out", out)
    code, printed, note = call(main, *files)
    assert (code, printed) == (0, "")
    assert f"quick.yaml overrides epochs: 30 of {mine}" in note
    assert f"{last} overrides epochs: 3 of" in note
    assert note.count("note: ") == 2  # crop is the same in both
    assert load_config([out]) == load_config(list(files[1:4]))
    assert call(main, *files) == (0, "", "")  # unchanged: said once


def test_finished_run_of_the_same_values_is_known(tmp_path: Path, call) -> None:
    run = tmp_path / "run"
    run.mkdir()
    asked = ("--config", ROOT / "configs/tuned.yaml", "--out", tmp_path / "run.yaml")
    assert call(main, *asked, "--finished", run)[0] == UNFINISHED
    text = (tmp_path / "run.yaml").read_text()
    # A run of before the key last_batch, which has its default value here.
    best = load_config([ROOT / "configs/best.yaml"])
    lines = [line for line in dump(best).splitlines() if not line.startswith("last_batch")]
    lines.append("grey: 0.5")  # and with a key that is no more
    (run / "config.yaml").write_text("\n".join(lines))
    asked = ("--config", ROOT / "configs/best.yaml", "--out", tmp_path / "run.yaml")
    assert call(main, *asked, "--finished", run)[0] == UNFINISHED  # no summary.json yet
    (run / "summary.json").write_text("{}")
    assert call(main, *asked, "--finished", run)[0] == 0
    assert call(main, *asked, "--set", "seed=1", "--finished", run)[0] == UNFINISHED
    assert (tmp_path / "run.yaml").read_text() != text


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("x[1:]", "x[:1]"),
        ("x[::2]", "x[2:]"),
        ("f(*a)", "f(**a)"),
        ("def f(a=1): pass", "def f(*, a=1): pass"),
        ("def f(a, /): pass", "def f(a): pass"),
        ("try: f()\nexcept E: pass\nelse: g()", "try: f()\nexcept E: pass\nfinally: g()"),
        ("x - 1", "1 - x"),
    ],
)
def test_digest_tells_code_apart(tmp_path: Path, monkeypatch, one: str, other: str) -> None:
    monkeypatch.setattr("common.ROOT", tmp_path)
    (tmp_path / "one.py").write_text(one)
    (tmp_path / "other.py").write_text(other)
    assert code_digest(("one.py",)) != code_digest(("other.py",))


def test_digest_of_code_is_that_of_every_python(tmp_path: Path, monkeypatch) -> None:
    """The digest was computed with Python 3.10, 3.11, 3.12 and 3.13."""
    (tmp_path / "x.py").write_text(CODE)
    monkeypatch.setattr("common.ROOT", tmp_path)
    assert code_digest(("x.py",)) == "35615ff996f3"
    (tmp_path / "x.py").write_text("half a line = (")
    with pytest.raises(SyntaxError) as caught:
        code_digest(("x.py",))
    assert caught.value.filename == str(tmp_path / "x.py")


@pytest.mark.parametrize("arguments", [["config.py"], ["data.py", "check"]])
def test_a_reader_that_leaves_ends_a_script_without_a_trace(
    dataset: Path, tmp_path: Path, arguments: list[str]
) -> None:
    """As: python config.py … | true. Python flushes what it printed at its end."""
    data = shutil.copytree(dataset, tmp_path / "data", ignore=shutil.ignore_patterns(".cache"))
    min((data / "training/image").iterdir()).unlink()  # a problem for data.py check
    (tmp_path / "set.yaml").write_text(f"data: {data}\n")
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, *arguments, "--config", str(tmp_path / "set.yaml")]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    pipes = {"stdout": write_end, "stderr": subprocess.PIPE}
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, timeout=60, **pipes)
    os.close(write_end)
    assert done.returncode == 141 and "Broken" not in done.stderr


def test_full_disk_is_one_line_and_other_errors_keep_their_trace(call) -> None:
    def fill_disk() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    assert call(fill_disk)[2] == "error: disk: No space left on device\n"
    with pytest.raises(FileNotFoundError):  # a student's own code may open files
        call(Path("no/file").read_text)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "last.pt"
    path.write_bytes(b"old")

    def fill_disk(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", fill_disk)
    with pytest.raises(UserError, match=r"last\.pt: cannot be written .*; make room"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_damaged_config_is_one_line(tmp_path: Path) -> None:
    text = dump(load_config([ROOT / "configs/best.yaml"], ["blur=0.5", "jitter=0.5", "crop=24"]))
    path, good = tmp_path / "bad.yaml", 0
    for data in corruptions(text.encode(), 80):
        path.write_bytes(data)
        try:
            config = load_config([path])
            check_data_keys(config)
            with torch.device("meta"):  # a mistyped width may be huge
                parameters = count_parameters(build_model(config))
            assert parameters > 0
            good += 1
        except UserError as error:
            assert "\n" not in str(error)
    assert 0 < good < 80
