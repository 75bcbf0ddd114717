"""Tests of evaluate.py: right numbers in table and JSON, right statistics, unfit files refused."""

import functools
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
from checkpoint import save_checkpoint
from config import load_config
from data import load_split
from model import build_model

ROOT = Path(__file__).parent.parent
CLASSES = ["background", "square", "triangle", "circle"]
CONTRACT = [
    *("name", "checkpoint", "data", "split", "images", "pixel_accuracy", "mean_iou"),
    *("mean_iou_foreground", "mean_dice", "per_class_iou", "dead_classes"),
]
SHAPES = {
    "small": ([[4, 3]], [[6, 3]]),
    "larger": ([[4, 3], [8, 3]], [[8, 3], ["classes", 3]]),
}


def write_checkpoint(folder: Path, data: Path, name: str, seed: int, **changes: object) -> Path:
    """A checkpoint with random weights: poor, but every class is predicted somewhere."""
    encoder, decoder = SHAPES[name]
    config = load_config([ROOT / "configs/default.yaml"], [])
    config |= {"name": name, "seed": seed, "data": str(data), "precision": "float32"}
    config |= {"encoder": encoder, "decoder": decoder, **changes}
    torch.manual_seed(seed)
    model = build_model(config)
    model(torch.rand(8, 3, 32, 32))  # fills the statistics of the batch norms
    path = folder / f"{name}-{seed}.pt"
    cost = {"images_seen": 1000 + seed, "train_seconds": 60.0 + seed}
    save_checkpoint(path, {"config": config, "model": model.state_dict(), "cost": cost})
    return path


@pytest.fixture(scope="module")
def checkpoints(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three seeds of one model, one of another."""
    folder = tmp_path_factory.mktemp("checkpoints")
    paths = [write_checkpoint(folder, dataset, "small", seed) for seed in (0, 1, 2)]
    paths.append(write_checkpoint(folder, dataset, "larger", 0, published_iou=0.987))
    return {path.stem: path for path in paths}


@pytest.fixture
def run(call: Callable) -> Callable:
    """Call evaluate.py as its command line does: (exit code, stdout, stderr)."""
    return functools.partial(call, evaluate.main, "--device", "cpu")


def refused(result: tuple[int, str, str], *parts: str) -> None:
    """Exit code 2, no table, and one line that names what is wrong."""
    code, out, err = result
    assert code == 2
    [line] = err.splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert part in line
    assert "mean IoU" not in out


def rows_of(table: str) -> dict[str, list[str]]:
    """The cells of the rows of a printed table by name; columns lie two or more spaces apart."""
    lines = [line.split("  ") for line in table.splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    header = next(i for i, line in enumerate(cells) if line[:1] == ["model"])
    width = len(cells[header])
    return {line[0]: line[1:] for line in cells[header:] if len(line) == width}


def column(table: str, name: str) -> dict[str, str]:
    """One column of a printed table by the name of the row."""
    rows = rows_of(table)
    place = rows.pop("model").index(name)
    return {row: cells[place] for row, cells in rows.items()}


def by_hand(path: Path, split: str) -> dict:
    """Scores from predictions of single images, counted in numpy as sets of pixels."""
    checkpoint = torch.load(path, weights_only=True)
    config = checkpoint["config"]
    model = build_model(config).eval()
    model.load_state_dict(checkpoint["model"])
    loaded = load_split(config, split)
    true = loaded.masks.numpy()
    with torch.no_grad():
        predicted = np.stack(
            [model(image[None] / 255)[0].numpy().argmax(0) for image in loaded.images]
        )
    iou, dice = [], []
    for c in range(4):
        both, either = (
            ((true == c) & (predicted == c)).sum(),
            ((true == c) | (predicted == c)).sum(),
        )
        iou.append(both / either if either else None)
        dice.append(2 * both / (both + either) if either else None)
    return {
        "images": len(true),
        "pixel_accuracy": (true == predicted).mean(),
        "mean_iou": np.mean([v for v in iou if v is not None]),
        "mean_iou_foreground": np.mean([v for v in iou[1:] if v is not None]),
        "mean_dice": np.mean([v for v in dice if v is not None]),
        "per_class_iou": dict(zip(CLASSES, iou, strict=True)),
        "dead_classes": [
            n for c, n in enumerate(CLASSES) if (true == c).any() and not (predicted == c).any()
        ],
        "background": (true == 0).mean(),
        "shown": [name for c, name in enumerate(CLASSES) if (true == c).any()],
    }


# ---- the numbers


def test_command_line_on_two_models(
    script: Callable, checkpoints: dict[str, Path], dataset: Path, tmp_path: Path
) -> None:
    paths = [checkpoints["small-0"], checkpoints["larger-0"]]
    results = tmp_path / "new" / "results.json"
    done = script("evaluate.py", *paths, "--device", "cpu", "--json", results)
    assert done.returncode == 0, done.stderr
    rows = json.loads(results.read_text())
    assert [row["name"] for row in rows] == ["small", "larger"]
    for row, path in zip(rows, paths, strict=True):
        assert set(CONTRACT) <= set(row)
        assert (row["checkpoint"], row["data"], row["split"]) == (
            str(path),
            str(dataset),
            "testing",
        )
        expected = by_hand(path, "testing")
        for key in CONTRACT[4:]:
            if key == "per_class_iou":
                assert list(row[key]) == CLASSES
            if key == "dead_classes":
                assert row[key] == expected[key]
            else:
                assert row[key] == pytest.approx(expected[key], abs=1e-5), key
        cells = {
            key: column(done.stdout, key)[row["name"]] for key in rows_of(done.stdout)["model"]
        }
        assert cells["accuracy"] == f"{row['pixel_accuracy']:.4f}"
        assert cells["mean IoU"] == f"{row['mean_iou']:.4f}"
        assert cells["mean Dice"] == f"{row['mean_dice']:.4f}"
        assert cells["dead classes"] == (", ".join(row["dead_classes"]) or "none")
        for name, iou in row["per_class_iou"].items():
            assert cells[name] == ("–" if iou is None else f"{iou:.4f}")
    # encoder 3→4, 4→4; decoder 4→6, 6→6; up-sampling 6→4; batch norms 4, 4, 6, 6
    count = 9 * (12 + 16 + 24 + 36 + 24) + (4 + 4 + 6 + 6 + 4) + 2 * (4 + 4 + 6 + 6)
    assert column(done.stdout, "parameters")["small"] == f"{count:,}"
    assert column(done.stdout, "lab IoU") == {
        **dict.fromkeys(["background only", "small"], "–"),
        "larger": "0.9870",
    }
    assert f"{rows[0]['images']} images" in done.stdout


@pytest.mark.parametrize("split", ["testing", "validation"])
def test_row_of_predicting_background_everywhere(
    run: Callable, checkpoints: dict[str, Path], split: str
) -> None:
    code, out, _ = run(checkpoints["larger-0"], "--split", split)
    assert code == 0
    truth = by_hand(checkpoints["larger-0"], split)
    share, shown = truth["background"], truth["shown"]
    assert list(rows_of(out))[1] == "background only"
    assert column(out, "accuracy")["background only"] == f"{share:.4f}"
    assert column(out, "mean IoU")["background only"] == f"{share / len(shown):.4f}"
    dice = 2 * share / (1 + share) / len(shown)
    assert column(out, "mean Dice")["background only"] == f"{dice:.4f}"
    assert column(out, "dead classes")["background only"] == ", ".join(shown[1:])
    for name in CLASSES[1:]:
        iou = "0.0000" if name in shown else "–"
        assert column(out, name)["background only"] == iou
    assert f"has accuracy {share:.3f} and mean IoU {share / len(shown):.3f}" in out


def test_mean_and_deviation_over_seeds(
    run: Callable, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    code, out, _ = run(*checkpoints.values(), "--json", tmp_path / "r.json")
    assert code == 0
    rows = [row for row in json.loads((tmp_path / "r.json").read_text()) if row["name"] == "small"]
    assert sorted(row["seed"] for row in rows) == [0, 1, 2]
    a, b, c = (row["mean_iou"] for row in rows)
    mean = (a + b + c) / 3
    deviation = (((a - mean) ** 2 + (b - mean) ** 2 + (c - mean) ** 2) / 2) ** 0.5  # of a sample
    assert deviation > 1e-4
    assert column(out, "mean IoU")["small"] == f"{mean:.4f} ± {deviation:.4f}"
    assert column(out, "n") == {"background only": "1", "small": "3", "larger": "1"}
    assert "±" not in column(out, "mean IoU")["larger"]
    accuracy = statistics.fmean(row["pixel_accuracy"] for row in rows)
    assert column(out, "accuracy")["small"] == f"{accuracy:.4f}"
    assert column(out, "images seen")["small"] == "1,001"
    assert column(out, "training")["small"] == "61 s"


def test_runs_of_one_name_and_seed_are_rows_of_their_own(
    run: Callable, dataset: Path, tmp_path: Path
) -> None:
    """As after make … RUNS=runs/rate SET=…; a mean over them would be one over settings."""
    paths = []
    for settings, width in (("a", 4), ("b", 5)):
        for seed in (0, 1):
            folder = tmp_path / settings / "small" / f"seed{seed}"
            folder.mkdir(parents=True)
            paths.append(write_checkpoint(folder, dataset, "small", seed, encoder=[[width, 3]]))
    code, out, _ = run(*paths)
    assert code == 0
    a, b = (f"small ({tmp_path / settings / 'small'})" for settings in "ab")
    counts = [line.split()[-1] for line in out.splitlines() if line.startswith("small (")]
    assert counts == ["2", "2"] and a in out and b in out
    parameters = column(out.replace(a, "a").replace(b, "b"), "parameters")
    assert parameters["a"] != parameters["b"]
    # Different seeds in different folders are no seeds of one experiment either.
    code, out, _ = run(paths[0], paths[3])
    assert code == 0 and a in out and b in out
    # The same file twice counts once.
    code, out, _ = run(paths[0], paths[0])
    assert code == 0 and "±" not in out
    # Two files of one run.
    twin = paths[0].with_name("last.pt")
    twin.write_bytes(paths[0].read_bytes())
    code, out, _ = run(paths[0], twin)
    assert code == 0 and f"small ({paths[0]})" in out and f"small ({twin})" in out


def test_results_stand_for_their_checkpoints(
    run: Callable, checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / f"{name}.json" for name in checkpoints]
    _, direct, _ = run(*checkpoints.values(), "--json", tmp_path / "all.json")
    for path, file in zip(checkpoints.values(), files, strict=True):
        run(path, "--json", file)
    mixed = [*files[:2], *list(checkpoints.values())[2:]]
    assert rows_of(run(*mixed)[1]) == rows_of(direct)
    monkeypatch.delattr(evaluate, "evaluate_checkpoint")  # from here on nothing is evaluated
    for sources in ([tmp_path / "all.json"], files):
        code, out, _ = run(*sources, "--json", tmp_path / "again.json")
        assert code == 0
        assert rows_of(out) == rows_of(direct)
        assert (tmp_path / "again.json").read_text() == (tmp_path / "all.json").read_text()


def test_checkpoint_on_another_data_set(
    run: Callable, checkpoints: dict[str, Path], dataset: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    for folder in ("image", "gt_image"):
        (other / "testing" / folder).mkdir(parents=True)
    for image in sorted((dataset / "validation/image").glob("*.png"))[:5]:
        (other / "testing/image" / image.name).write_bytes(image.read_bytes())
        mask = dataset / "validation/gt_image" / f"gt_{image.name}"
        (other / "testing/gt_image" / mask.name).write_bytes(mask.read_bytes())
    path = checkpoints["small-0"]
    code, out, _ = run(path, "--data", other, "--json", tmp_path / "other.json")
    assert code == 0
    [row] = json.loads((tmp_path / "other.json").read_text())
    assert (row["data"], row["images"]) == (str(other), 5)
    assert f"{other}, testing split, 5 images" in out
    refused(run(tmp_path / "other.json", path), str(path), "digest")


# ---- what cannot share a table


@pytest.mark.parametrize("key", ["split", "profile"])
def test_mixing_is_refused(
    run: Callable, checkpoints: dict[str, Path], dataset: Path, tmp_path: Path, key: str
) -> None:
    if key == "split":
        other = tmp_path / "validation.json"
        assert run(checkpoints["small-1"], "--split", "validation", "--json", other)[0] == 0
    else:
        other = write_checkpoint(tmp_path, dataset, "small", 3, profile="quick")
    results = tmp_path / "mixed.json"
    refused(run(checkpoints["small-0"], other, "--json", results), key)
    assert not results.exists()


# ---- what is no checkpoint and no result


class Code:
    """Unpickled naively, it runs a command."""

    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self) -> tuple:
        return os.system, (f"touch '{self.touched}'",)


def test_code_in_a_checkpoint_is_not_run(
    script: Callable, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    touched, path = tmp_path / "touched", tmp_path / "evil.pt"
    checkpoint = torch.load(checkpoints["small-0"], weights_only=True)
    torch.save(checkpoint | {"extra": Code(touched)}, path)
    done = script("evaluate.py", path, "--device", "cpu")
    refused((done.returncode, done.stdout, done.stderr), str(path))
    assert not touched.exists()
    torch.load(path, weights_only=False)  # the trap is one
    assert touched.exists()


@pytest.mark.parametrize("kind", ["missing", "folder", "empty", "text", "noise", "cut", "foreign"])
def test_what_is_no_checkpoint(
    run: Callable, checkpoints: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    good, path = checkpoints["small-0"].read_bytes(), tmp_path / "bad.pt"
    contents = {
        "empty": b"",
        "text": b"epoch,loss\n1,0.5\n",
        "noise": np.random.default_rng(0).bytes(5000),
        "cut": good[: len(good) // 2],
    }
    if kind in contents:
        path.write_bytes(contents[kind])
    elif kind == "folder":
        path.mkdir()
    elif kind == "foreign":
        torch.save({"state_dict": {"weight": torch.zeros(3)}}, path)
    refused(run(checkpoints["small-1"], path, "--json", tmp_path / "r.json"), str(path))
    assert not (tmp_path / "r.json").exists()


@pytest.mark.parametrize("share", [0.05, 0.3, 0.7, 0.95, 0.999])
def test_checkpoint_cut_short_anywhere(
    run: Callable, checkpoints: dict[str, Path], tmp_path: Path, share: float
) -> None:
    good, path = checkpoints["small-0"].read_bytes(), tmp_path / "cut.pt"
    path.write_bytes(good[: int(share * len(good))])
    refused(run(path), str(path))


@pytest.mark.parametrize(
    "text", ["", "{", "[1, 2]", "{}", "null", "[]", '[{"name": "small"}]', "\x00\xff"]
)
def test_what_is_no_file_of_results(run: Callable, tmp_path: Path, text: str) -> None:
    path = tmp_path / "results.json"
    path.write_bytes(text.encode("latin-1"))
    refused(run(path), str(path))


@pytest.mark.parametrize(
    "key", ["name", "split", "images", "mean_iou", "per_class_iou", "dead_classes", "checkpoint"]
)
def test_results_without_a_key(
    run: Callable, checkpoints: dict[str, Path], tmp_path: Path, key: str
) -> None:
    path = tmp_path / "results.json"
    assert run(checkpoints["small-0"], "--json", path)[0] == 0
    rows = json.loads(path.read_text())
    del rows[0][key]
    path.write_text(json.dumps(rows))
    refused(run(path), str(path))


def test_missing_results(run: Callable, tmp_path: Path) -> None:
    refused(run(tmp_path / "none.json"), "none.json")
