"""Tests of tools/report.py and facts.py: the files written, what is left out, numbers by hand."""

import json
import re
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import corruptions, write_checkpoint

from config import dump
from evaluate import main as evaluate
from figures import looks_of
from model import read_checkpoint
from tools import facts, report

CLASSES = ["background", "square", "triangle", "circle"]


@pytest.fixture
def write_run(call: Callable, dataset: Path, tmp_path: Path) -> Callable:
    """`write_run("tune/a-1", seed, iou)`: a finished run of two epochs with random weights."""

    def write(experiment: str, seed: int, iou: float, seen: int = 100, **values: object) -> Path:
        folder = tmp_path / "runs" / experiment / f"seed{seed}"
        name = folder.parent.name
        values |= {"cost": {"images_seen": seen, "train_seconds": 7.0 + seed}}
        path = write_checkpoint(folder, dataset, name, seed, images_per_epoch=50, **values)
        config = read_checkpoint(path, torch.device("cpu"))["config"]
        (folder / "config.yaml").write_text(dump(config))
        machine = {"device": "toy", "threads": 1, "precision": "float32", "torch": "2"}
        (folder / "environment.json").write_text(json.dumps(machine))
        each = {"loss": 1 - iou, "pixel_accuracy": 0.5, "mean_dice": 0.5, "dead_classes": []}
        each |= {"mean_iou_foreground": 0.5, "per_class_iou": dict.fromkeys(CLASSES, iou)}
        first, last = each | {"mean_iou": iou / 2}, each | {"mean_iou": iou}
        entries = [
            {"epoch": 1, "training": first, "validation": first | {"dead_classes": ["circle"]}}
        ]
        entries.append({"epoch": 2, "training": last, "validation": last})
        lines = "".join(json.dumps(entry) + "\n" for entry in entries)
        (folder / "metrics.jsonl").write_text(lines)
        summary = {"name": name, "seed": seed, "profile": config["profile"], "digest": "d"}
        summary |= {"images_seen": seen, "train_seconds": 7.0 + seed, "parameters": 9}
        summary |= {"code": None, "training": last, "validation": last}
        (folder / "summary.json").write_text(json.dumps(summary))
        if experiment.split("/")[0] not in report.UNTESTED:
            files = ("--json", folder / "testing.json", "--predictions", folder / "testing.npz")
            assert call(evaluate, path, "--device", "cpu", *files)[0] == 0
        return folder

    return write


@pytest.fixture
def make(call: Callable, tmp_path: Path) -> Callable:
    """Call the report's main on the runs: (exit code, text of report.md, errors)."""

    def run() -> tuple[int, str, str]:
        where = ("--runs", tmp_path / "runs", "--out", tmp_path / "out")
        code, _, error = call(report.main, *where)
        return code, (tmp_path / "out/report.md").read_text() if code == 0 else "", error

    return run


def test_report_is_complete_and_names_what_is_not(
    write_run: Callable, make: Callable, tmp_path: Path
) -> None:
    for seed in (0, 1):
        for name in ("initial", "modified", "tuned"):
            write_run(name, seed, 0.8 + 0.01 * seed)
        # The best of validation is chosen; on the test split it is below flip-0.3, alike to tuned.
        write_run("augment/flip-0.3", seed, 0.7)
        write_run("augment/flip-0.5", seed + 3, 0.9)
        write_run("tune/dropout-0.1", seed, 0.4)
        write_run("heads/wide", seed, 0.9 - 0.5 * seed, profile="quick")  # seed 1 ends poor
        write_run("heads/tuned", seed, 0.4, profile="quick")
    write_run("overfit/one-batch-tuned", 0, 0.9999)
    (write_run("augment/blur-0.3", 0, 0.9) / "summary.json").unlink()
    other = write_run("best", 0, 0.9, profile="quick")
    longer = write_run("tune/dropout-0.2", 0, 0.3, seen=200)
    for seed, seen in enumerate((100, 200)):
        mine = write_run("mine", seed, 0.9, seen=seen)
    with open(old := write_run("final", 0, 0.9) / "config.yaml", "a") as file:
        file.write("a_key_of_last_year: 1\n")
    shutil.rmtree(tmp_path / "runs/initial/seed1")
    code, text, error = make()
    assert (code, error) == (0, "")
    assert f"`{tmp_path}/runs/augment/blur-0.3/seed0` is not finished" in text
    assert f"`{other}` differs from its table in profile" in text
    assert f"`{mine}` differs from its table in images seen" in text
    assert f"`{longer}` differs from its table in images seen" in text
    assert f"left out: {old}: unknown key 'a_key_of_last_year'" in text
    assert "The lab published 0.9778 and 0.9824" in text
    assert "`make train-final` makes final" in text and "makes blur-0.3" in text
    values = [
        json.loads((tmp_path / f"runs/tuned/seed{s}/testing.json").read_text())[0]["mean_iou"]
        for s in (0, 1)
    ]
    mean = f"{statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f}"
    assert re.search(rf"\| (\*\*)?tuned(\*\* \(best\))? \| {mean} \| 2 \|", text)
    assert "`flip-0.5` is best on the validation split" in text and "0.8008" in text
    assert "**Dropout**: its settings differ by 0.4050" in text  # 0.805 - 0.4
    assert "| one-batch-tuned | all | 2 | 0.9999 |" in text
    assert "| wide | 2 | 2 | 0 | 1 | 1.000 |" in text  # dead after each epoch, poor, p
    assert "| tuned | 2 | 2 | 0 | 2 | – |" in text and "| heads/wide" not in text
    assert "ends with a dead class of: tuned, wide; none with a poor one of: none.\n" in text
    assert "1 of them lie below it there" in text
    assert "the last epoch of tuned has 0.8000, the average over all epochs 0.6000" in text

    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["statistics"]["tuned"]["mean_iou"]["values"] == values
    assert "| tuned, seed 0 | circle / – |" in text
    assert len(results["all_runs"]) == 20
    page, pictures = (tmp_path / "out/report.html").read_text(), (tmp_path / "out/figures")
    links = re.findall(r"""(?:src|href)=["']([^"']*)""", page)
    assert len(links) == len(list(pictures.glob("*.png"))) == 9
    assert all(link.startswith("data:image/png;base64,") for link in links)
    assert "url(" not in page and "@import" not in page and "<table>" in page
    for picture in pictures.glob("*.png"):
        assert f"](figures/{picture.name})" in text


def test_a_model_of_another_budget_stands_apart(write_run: Callable, make: Callable) -> None:
    short, other = (write_run("initial", seed, 0.8, seen=30 + seed) for seed in (0, 1))
    for seed in (0, 1):
        write_run("modified", seed, 0.8)
    code, text, _ = make()
    assert code == 0 and f"`{other}` differs from its table in images seen" in text
    assert f"`{short}`" not in text and "`make train-initial` makes initial" in text
    assert "Not run yet: `make train-initial train-modified`." in text
    first, others = text.split("Budgets differ between these rows")
    assert re.search(r"\| modified \|.*\| 100 \|", first) and "| initial |" not in first
    assert re.search(r"\| initial \|.*\| 30 \|", others)


def test_report_of_sweeps_alone_is_sorted_by_validation(
    write_run: Callable, make: Callable
) -> None:
    for name, values in {"low": (0.5, 0.52), "high": (0.9, 0.92), "middle": (0.7,)}.items():
        for seed, value in enumerate(values):
            write_run(f"tune/width-{name}", seed, value)
    code, text, _ = make()
    cells = [line.split(" | ")[:3] for line in text.splitlines() if line.startswith("| width-")]
    assert code == 0 and cells[:3] == [
        ["| width-high", "0.9100 ± 0.0141", "2"],
        ["| width-middle", "0.7000", "1"],
        ["| width-low", "0.5100 ± 0.0141", "2"],
    ]
    assert "Not run yet: `make report`." in text and "Not run yet: `make augment`." in text


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "summary.json", "environment.json", "config.yaml"]
)
def test_damaged_file_is_named_or_the_report_is_whole(
    write_run: Callable, make: Callable, name: str
) -> None:
    path = write_run("tune/a-1", 0, 0.5) / name
    good, refused = path.read_bytes(), 0
    for content in corruptions(good, 25):
        path.write_bytes(content)
        code, text, error = make()
        assert (code == 0 and "What is missing" in text) or (
            code == 2 and error.startswith("error: ") and error.count("\n") == 1
        )
        refused += code == 2 and str(path) in error
    assert refused > 5


def test_blurred_masks_are_compared_with_tuned(
    write_run: Callable, make: Callable, tmp_path: Path
) -> None:
    for name, seed in (("tuned", 0), ("blurred-masks", 1), ("tune/skip-full", 2)):
        write_run(name, seed, 0.8 + 0.01 * seed)
    assert make()[0] == 0
    found = json.loads((tmp_path / "out/results.json").read_text())
    [[tuned], [blurred]] = (
        found["statistics"][n]["mean_iou"]["values"] for n in ("tuned", "blurred-masks")
    )
    assert found["blurred"]["difference"] == tuned - blurred != 0
    assert found["tuned"]["skip-full"]["difference"] == pytest.approx(0.02)


def test_what_a_single_scene_decides_is_noise() -> None:
    def rows(first: float, *others: float) -> list[dict]:
        ious = [[first + seed / 1000, *others] for seed in range(3)]
        return [{"mean_iou": statistics.fmean(each), "contributions": each} for each in ious]

    low = rows(0.5, 0.8, 0.8, 0.8)
    assert facts.contrast(rows(0.6, 0.9, 0.91, 0.89), low)["result"] == "more"
    one = facts.contrast(rows(0.9, 0.8, 0.81, 0.79), low)  # by the seeds alone it were "more"
    assert one["result"] == "noise" and one["difference"] == pytest.approx(0.1)
    scenes = statistics.stdev([0.4, 0, 0.01, -0.01]) / 2 * 3.182  # t of three degrees of freedom
    assert one["interval"] == f"+0.1000 ± {scenes:.4f}"
    assert facts.contrast(low, rows(0.6, 0.9, 0.91, 0.89))["result"] == "less"
    for row in (alone := rows(0.6, 0.9)) + (without := rows(0.9, 0.9)):
        del row["contributions"]  # of validation: the seeds decide
    assert facts.contrast(without, alone)["result"] == "more"


def test_lines_of_a_figure_look_unlike() -> None:
    looks = looks_of(["initial", "modified", "tuned", "a", "b", "c", "d", "e"])
    assert len(set(looks.values())) == 8 and looks["tuned"] == looks_of(["a", "tuned"])["tuned"]


def test_no_runs_is_one_line(make: Callable, tmp_path: Path) -> None:
    code, _, error = make()
    assert code == 2 and error.startswith(f"error: {tmp_path / 'runs'}: holds no finished run")
