"""Tests of evaluate.py: numbers in table and JSON, statistics over seeds, refused mixtures."""

import functools
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import corruptions, write_checkpoint

import evaluate
from data import load_split
from model import build_model

CLASSES = ["background", "square", "triangle", "circle"]
CONTRACT = [
    *("name", "checkpoint", "data", "split", "images", "pixel_accuracy", "mean_iou"),
    *("mean_iou_foreground", "mean_dice", "per_class_iou", "dead_classes"),
]
LARGER = {"encoder": [[4, 3], [8, 3]], "decoder": [[8, 3], ["classes", 3]]}


@pytest.fixture(scope="module")
def paths(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Write checkpoints: three seeds of one model, one of another."""
    root = tmp_path_factory.mktemp("checkpoints")
    small = [write_checkpoint(root / f"small/seed{s}", dataset, "small", s) for s in (0, 1, 2)]
    return [*small, write_checkpoint(root / "tuned/seed0", dataset, "tuned", 0, **LARGER)]


@pytest.fixture
def run(call: Callable) -> Callable:
    """Call evaluate.py as its command line does: (exit code, stdout, stderr)."""
    return functools.partial(call, evaluate.main, "--device", "cpu")


def table_of(text: str) -> dict[str, dict[str, str]]:
    """Read a printed table: model → heading → cell; columns lie two or more spaces apart."""
    lines = [[c.strip() for c in line.split("  ") if c.strip()] for line in text.splitlines()]
    start = next(i for i, line in enumerate(lines) if line[:1] == ["model"])
    rows = [line for line in lines[start + 1 :] if len(line) == len(lines[start])]
    return {row[0]: dict(zip(lines[start], row, strict=True)) for row in rows}


def by_hand(path: Path, split: str) -> dict:
    """Score predictions of single images, counted in numpy as sets of pixels."""
    checkpoint = torch.load(path, weights_only=True)
    model = build_model(checkpoint["config"]).eval()
    model.load_state_dict(checkpoint["model"])
    loaded = load_split(checkpoint["config"], split)
    true = loaded.masks.numpy()
    with torch.no_grad():
        logits = [model(image[None] / 255)[0].numpy() for image in loaded.images]
    predicted = np.stack(logits).argmax(axis=1)
    iou, dice = [], []
    for c in range(4):
        a, b = true == c, predicted == c
        iou.append((a & b).sum() / (a | b).sum() if (a | b).any() else None)
        dice.append(2 * (a & b).sum() / (a.sum() + b.sum()) if (a | b).any() else None)
    means = [np.mean([v for v in values if v is not None]) for values in (iou, iou[1:], dice)]
    dead = [n for c, n in enumerate(CLASSES) if (true == c).any() and not (predicted == c).any()]
    return {
        **dict(zip(("mean_iou", "mean_iou_foreground", "mean_dice"), means, strict=True)),
        **{"images": len(true), "pixel_accuracy": (true == predicted).mean()},
        "per_class_iou": dict(zip(CLASSES, iou, strict=True)),
        **{"dead_classes": dead, "background": (true == 0).mean()},
        "shown": [name for c, name in enumerate(CLASSES) if (true == c).any()],
    }


def test_command_line_on_two_models(
    script: Callable, paths: list[Path], dataset: Path, tmp_path: Path
) -> None:
    results = tmp_path / "new/results.json"
    done = script("evaluate.py", paths[0], paths[3], "--device", "cpu", "--json", results)
    assert done.returncode == 0, done.stderr
    rows, table = json.loads(results.read_text()), table_of(done.stdout)
    for row, path in zip(rows, (paths[0], paths[3]), strict=True):
        assert set(CONTRACT) <= set(row)
        assert [row[k] for k in CONTRACT[1:4]] == [str(path), str(dataset), "testing"]
        expected, cells = by_hand(path, "testing"), table[row["name"]]
        for key in CONTRACT[4:-1]:
            assert row[key] == pytest.approx(expected[key], abs=1e-5), key
        assert row["dead_classes"] == expected["dead_classes"]
        for head, key in (("accuracy", "pixel_accuracy"), ("mean Dice", "mean_dice")):
            assert cells[head] == f"{row[key]:.4f}"
        assert cells["mean IoU"] == f"{row['mean_iou']:.4f}"
        assert cells["dead classes"] == (", ".join(row["dead_classes"]) or "none")
        for name, iou in row["per_class_iou"].items():
            assert cells.get(name, "–") == ("–" if iou is None else f"{iou:.4f}")
    # encoder 3→4, 4→4; decoder 4→6, 6→6; up-sampling 6→4; batch norms 4, 4, 6, 6
    count = 9 * (12 + 16 + 24 + 36 + 24) + (4 + 4 + 6 + 6 + 4) + 2 * (4 + 4 + 6 + 6)
    assert table["small"]["parameters"] == f"{count:,}"
    assert [table[name]["lab IoU"] for name in ("small", "tuned")] == ["–", "0.9878"]


@pytest.mark.parametrize("split", ["testing", "validation"])
def test_row_of_predicting_background_everywhere(
    run: Callable, paths: list[Path], split: str
) -> None:
    code, out, _ = run(paths[3], "--split", split)
    row, truth = table_of(out)["background only"], by_hand(paths[3], split)
    share, shown = truth["background"], truth["shown"]
    assert code == 0 and row["accuracy"] == f"{share:.4f}"
    assert row["mean IoU"] == f"{share / len(shown):.4f}"
    assert row["mean Dice"] == f"{2 * share / (1 + share) / len(shown):.4f}"
    assert row["dead classes"] == ", ".join(shown[1:])


def test_mean_and_deviation_over_seeds(run: Callable, paths: list[Path], tmp_path: Path) -> None:
    code, out, _ = run(*paths, "--json", tmp_path / "r.json")
    rows = [row for row in json.loads((tmp_path / "r.json").read_text()) if row["name"] == "small"]
    values, table = [row["mean_iou"] for row in rows], table_of(out)
    assert code == 0 and [row["seed"] for row in rows] == [0, 1, 2]
    mean, std = statistics.fmean(values), statistics.stdev(values)
    assert std > 1e-4 and table["small"]["mean IoU"] == f"{mean:.4f} ± {std:.4f}"
    assert [table[n]["n"] for n in ("background only", "small", "tuned")] == ["1", "3", "1"]
    assert "±" not in table["tuned"]["mean IoU"]
    assert (table["small"]["images seen"], table["small"]["training"]) == ("1,001", "61 s")


def test_runs_of_one_name_in_two_folders_are_two_rows(
    run: Callable, dataset: Path, tmp_path: Path
) -> None:
    """As after make … RUNS=runs/rate SET=…; a mean over them would be one over settings."""
    folders = [tmp_path / settings / "small" for settings in "ab"]
    files = [
        write_checkpoint(folder / f"seed{seed}", dataset, "small", seed)
        for folder in folders
        for seed in (0, 1)
    ]
    table = table_of(run(*files, files[0])[1])  # one given twice counts once
    assert [table[f"small ({folder})"]["n"] for folder in folders] == ["2", "2"]


def test_results_stand_for_their_checkpoints(
    run: Callable, paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, direct, _ = run(*paths, "--json", tmp_path / "all.json")
    run(paths[0], "--json", tmp_path / "one.json")
    assert table_of(run(tmp_path / "one.json", *paths[1:])[1]) == table_of(direct)
    monkeypatch.delattr(evaluate, "evaluate_checkpoint")  # from here on nothing is evaluated
    code, out, _ = run(tmp_path / "all.json", "--json", tmp_path / "again.json")
    assert code == 0 and table_of(out) == table_of(direct)
    assert (tmp_path / "again.json").read_text() == (tmp_path / "all.json").read_text()
    code, out, _ = run(tmp_path / "all.json", "--goal", "0")
    assert code == 0 and "median 60.5 s of training" in out
    code, _, error = run(tmp_path / "all.json", "--goal", "0.99")
    assert code == 2 and error.startswith("error: mean IoU 0.99: ")


def test_goal_refuses_an_unfinished_run(run: Callable, dataset: Path, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, dataset, "small", 0, cost={})
    code, _, error = run(path, "--goal", "0", "--json", tmp_path / "kept.json")
    assert code == 2 and "not finished" in error and (tmp_path / "kept.json").exists()


def test_predictions_are_of_one_checkpoint(
    run: Callable, paths: list[Path], tmp_path: Path
) -> None:
    code, out, error = run(*paths, "--predictions", tmp_path / "p.npz")
    assert code == 2 and "give one" in error and out == "" and not [*tmp_path.iterdir()]


@pytest.mark.parametrize("key", ["split", "profile", "digest"])
def test_mixing_is_refused_after_the_results_are_written(
    run: Callable, paths: list[Path], dataset: Path, tmp_path: Path, key: str
) -> None:
    other = tmp_path / "other.json"
    assert run(paths[1], "--split", "validation", "--json", other)[0] == 0
    if key != "split":
        run(paths[1], "--json", other)
        other.write_text(json.dumps([json.loads(other.read_text())[0] | {key: "another"}]))
    code, out, error = run(paths[0], other, "--json", tmp_path / "mixed.json")
    assert code == 2 and error.splitlines()[-1].startswith(f"error: {paths[1]}: differs")
    assert key in error and out == ""
    assert len(json.loads((tmp_path / "mixed.json").read_text())) == 2


def test_damaged_results_are_one_line_or_right(
    run: Callable, paths: list[Path], tmp_path: Path
) -> None:
    file, damaged = tmp_path / "good.json", tmp_path / "damaged.json"
    run(paths[0], "--json", file)
    refused = 0
    for content in corruptions(file.read_bytes()):
        damaged.write_bytes(content)
        code, out, error = run(damaged)
        assert (code == 0 and "mean IoU" in out) or (
            code == 2 and error.startswith(f"error: {damaged}: ") and error.count("\n") == 1
        )
        refused += code == 2
    assert refused > 100
