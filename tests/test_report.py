"""Tests of report.py and what it is made of: numbers, refusals, missing runs, the files written."""

import itertools
import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import collect
import figures
import report
import tables
from checkpoint import save_checkpoint
from config import dump, load_config
from errors import UserError
from evaluate import evaluate_checkpoint
from metrics import scores
from model import build_model

ROOT = Path(__file__).parent.parent
CLASSES = ["background", "square", "triangle", "circle"]


def score(mean_iou: float) -> dict:
    """Scores as train.py writes them, of which only the mean IoU matters."""
    rest = dict.fromkeys(("pixel_accuracy", "mean_dice", "mean_iou_foreground"), 0.5)
    return {"loss": 1 - mean_iou, "mean_iou": mean_iou, "dead_classes": [], **rest}


def write_run(runs: Path, data: Path, experiment: str, seed: int, iou: float, **changes) -> Path:
    """A finished run of two epochs: files by hand and a checkpoint with random weights."""
    folder = runs / experiment / f"seed{seed}"
    folder.mkdir(parents=True)
    digest = changes.pop("training_digest", "d1")
    config = load_config([ROOT / "configs/default.yaml"], [f"seed={seed}", f"data={data}"])
    config |= {"name": folder.parent.name, "precision": "float32", "epochs": 2, "device": "cpu"}
    config |= {"encoder": [[4, 3]], "decoder": [[6, 3]], "images_per_epoch": 50, **changes}
    (folder / "config.yaml").write_text(dump(config))
    where = {"device": "toy", "threads": 1, "precision": "float32", "torch": "2", "seed": seed}
    (folder / "environment.json").write_text(json.dumps(where))
    lines = [
        {"epoch": e, "training": score(iou / (3 - e)), "validation": score(iou / (3 - e))}
        for e in (1, 2)
    ]
    lines[0]["validation"]["dead_classes"] = ["circle"]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    cost = {"images_seen": 50 * config["epochs"], "train_seconds": 7.0 + seed}
    summary = {"name": config["name"], **cost, "validation": score(iou)}
    (folder / "summary.json").write_text(json.dumps(summary))
    torch.manual_seed(seed)
    state = {"config": config, "model": build_model(config).state_dict(), "cost": cost}
    save_checkpoint(folder / "best.pt", {**state, "data_digest": digest})
    if experiment.split("/")[0] not in collect.UNTESTED:
        row = evaluate_checkpoint(folder / "best.pt", None, "testing", "cpu")
        (folder / "testing.json").write_text(json.dumps([row]))
    return folder


@pytest.fixture
def make(call: Callable) -> Callable:
    """`make(runs, out)` calls report.py as its command line does: (exit code, stderr)."""

    def run(runs: Path, out: Path) -> tuple[int, str]:
        code, _, error = call(report.main, "--runs", runs, "--out", out, "--device", "cpu")
        return code, error

    return run


# ---- statistics


def stat(*values: float) -> dict:
    return tables.over_seeds(list(values))


def test_mean_and_deviation_over_seeds_are_those_of_a_sample() -> None:
    found = stat(0.91, 0.95, 0.93)
    assert (found["mean"], found["std"], found["n"]) == pytest.approx((0.93, 0.02, 3))
    assert tables.show(found) == "0.9300 ± 0.0200" and tables.show(stat(0.5)) == "0.5000"
    assert tables.over_seeds([0.5, None]) is None


@pytest.mark.parametrize(
    ("first", "second", "best"),
    [
        ((0.95, 0.97), (0.90, 0.92), "a"),  # 0.05 apart, 2 standard errors are 0.0283
        ((0.93, 0.95), (0.91, 0.93), None),  # 0.02 apart
        ((0.90, 0.92), (0.95, 0.97), "b"),
        ((0.99,), (0.10, 0.12), None),  # one seed has no spread
        ((0.99,), (0.10,), None),
    ],
)
def test_best_is_marked_only_beyond_seed_noise(
    first: tuple, second: tuple, best: str | None
) -> None:
    assert tables.best_of({"a": stat(*first), "b": stat(*second)}) == best


def test_table_of_tuning_is_sorted_by_validation_with_spread_and_n(
    tmp_path: Path, dataset: Path
) -> None:
    for name, values in {"low": (0.5, 0.52), "high": (0.9, 0.92), "middle": (0.7,)}.items():
        for seed, value in enumerate(values):
            write_run(tmp_path, dataset, f"tune/width-{name}", seed, value)
    groups, unfinished = collect.find_runs(tmp_path)
    assert unfinished == []
    blocks = tables.experiments(groups, tmp_path)
    (rows,) = [block[2] for block in blocks if block[0] == "table"]
    assert [row[:4] for row in rows] == [
        ["width-high", "0.9100 ± 0.0141", "2", ""],  # the runner-up has one seed: no mark
        ["width-middle", "0.7000", "1", ""],
        ["width-low", "0.5100 ± 0.0141", "2", ""],
    ]


# ---- what figures show


def test_many_matrices_at_once_score_as_one_does() -> None:
    generator = np.random.default_rng(0)
    matrices = generator.integers(0, 9, (20, 4, 4))
    matrices[:5, 2], matrices[:5, :, 2] = 0, 0  # a class that is not there
    one_by_one = [scores(torch.from_numpy(m), CLASSES)["mean_iou"] for m in matrices]
    assert figures.mean_iou(matrices) == pytest.approx(one_by_one)


def in_band(mask: np.ndarray, y: int, x: int, c: int, width: int) -> bool:
    """By the definition: of the class, and within `width` of what is not, or of the outside."""
    if mask[y, x] != c:
        return False
    steps = range(-width, width + 1)
    near = [(y + dy, x + dx) for dy, dx in itertools.product(steps, steps)]
    inside = [0 <= v < mask.shape[0] and 0 <= u < mask.shape[1] for v, u in near]
    return not all(ok and mask[p] == c for ok, p in zip(inside, near, strict=True))


@pytest.mark.parametrize("width", [1, 2])
def test_boundary_iou_is_that_of_the_definition(width: int) -> None:
    true, predicted = np.zeros((2, 2, 16, 18), np.uint8)
    true[0, 2:12, 3:15], predicted[0, 3:13, 3:14] = 1, 1
    true[1, 8:, 10:], predicted[1, 7:, 11:] = 2, 2  # touches the border of the image
    predicted[1, 0, 0] = 1
    mean, each = figures.boundary_iou(torch.from_numpy(predicted), torch.from_numpy(true), 4, width)
    for c in range(4):
        both = either = 0
        for i, y, x in itertools.product(range(2), range(16), range(18)):
            a, b = in_band(true[i], y, x, c, width), in_band(predicted[i], y, x, c, width)
            both, either = both + (a and b), either + (a or b)
        assert each[c] == (both / either if either else None)
    assert each[3] is None
    assert mean == pytest.approx(statistics.fmean(each[:3]))


def test_bootstrap_repeats_itself_and_needs_unlike_frames_to_scatter() -> None:
    generator = np.random.default_rng(1)
    groups = [f"{i // 10:06d}" for i in range(80)]
    matrices = generator.integers(1, 100, (80, 3, 3))
    first, again = figures.bootstrap(matrices, groups), figures.bootstrap(matrices, groups)
    assert first == again
    assert first != figures.bootstrap(matrices, groups, seed=1)
    assert (first["images"], first["sequences"], first["batch_images"]) == (80, 8, 50)
    assert first["score"] == pytest.approx(figures.mean_iou(matrices.sum(axis=0)))
    for kind in ("whole", "batch", "batch of new"):
        assert first[kind]["low"] < first["score"] < first[kind]["high"]
        values = np.array(first[kind]["values"])
        outside = (values < first[kind]["low"]) | (values > first[kind]["high"])
        assert outside.mean() == pytest.approx(0.05, abs=0.002)
    alike = figures.bootstrap(np.stack([matrices[0]] * 80), groups)
    assert alike["whole"]["low"] == alike["batch"]["high"] == pytest.approx(alike["score"])


def test_a_metric_that_is_never_reset_is_a_running_mean() -> None:
    assert figures.running_mean([0.2, 0.8, 0.8]) == pytest.approx([0.2, 0.5, 0.6])
    assert figures.running_mean([0.2, 0.8], [0.8, 0.9]) == pytest.approx([1.9 / 3, 2.7 / 4])


# ---- the whole report


def test_report_is_complete_and_names_what_is_not(
    tmp_path: Path, dataset: Path, make: Callable
) -> None:
    runs, out = tmp_path / "runs", tmp_path / "report"
    for seed in (0, 1):
        for name in ("initial", "modified", "tuned"):
            write_run(runs, dataset, name, seed, 0.8 + 0.01 * seed)
        write_run(runs, dataset, "augment/flip-0.3", seed, 0.9, published_iou=0.8008)
        write_run(runs, dataset, "tune/dropout-0.1", seed, 0.4)
    write_run(runs, dataset, "overfit/one-batch-tuned", 0, 0.9999)
    crashed = write_run(runs, dataset, "augment/blur-0.3", 0, 0.9)
    (crashed / "summary.json").unlink()
    code, message = make(runs, out)
    assert code == 2
    assert message.startswith("error: ") and message.count("\n") == 1 and str(crashed) in message

    results = json.loads((out / "results.json").read_text())
    text, page = ((out / f"report.{kind}").read_text() for kind in ("md", "html"))
    assert str(crashed) in text
    assert "`make train-best`: best" in text
    assert "blur-0.3" in results["missing"]["augment"]
    assert "flip-0.3" not in results["missing"]["augment"]
    tested = [json.loads((runs / f"tuned/seed{s}/testing.json").read_text())[0] for s in (0, 1)]
    values = [row["mean_iou"] for row in tested]
    assert results["statistics"]["tuned"]["testing"]["mean_iou"]["values"] == values
    assert (
        f"| tuned | {statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f} | 2 |" in text
    )
    assert "0.8008" in text  # the lab's number beside ours
    assert results["running_average"]["never reset"] == pytest.approx([0.4, 0.6])
    assert results["dead_classes"]["tuned, seed 0"] == [["circle"], []]
    assert results["recheck"] == 0
    impact = results["answers"]["What had the greatest impact?"]
    assert impact["range"]["dropout"] == pytest.approx(0.805 - 0.4)
    assert impact["answer"].startswith("**Dropout**")
    assert "| one-batch-tuned | all | 2 |" in text

    links = re.findall(r"""(?:src|href|srcset|data)=["']([^"']*)""", page)
    pictures = sorted((out / "figures").glob("*.png"))
    assert len(links) == len(pictures) >= 9
    assert all(link.startswith("data:image/png;base64,") for link in links)
    assert "url(" not in page and "@import" not in page
    for picture in pictures:
        assert f"](figures/{picture.name})" in text


def test_report_of_sweeps_alone_says_which_targets_make_the_models(
    tmp_path: Path, dataset: Path, make: Callable
) -> None:
    write_run(tmp_path / "runs", dataset, "tune/dropout-0.1", 0, 0.4)
    assert make(tmp_path / "runs", tmp_path / "out") == (0, "")
    text = (tmp_path / "out/report.md").read_text()
    for target in ("train-initial", "train-tuned", "augment", "final"):
        assert f"`make {target}`" in text


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"epochs": 3}, "epochs (3, not 2)"),
        ({"batch_size": 4}, "batch_size (4, not 32)"),
        ({"profile": "quick"}, "profile (quick, not full)"),
        ({"training_digest": "d2"}, "training data (digest)"),
    ],
)
@pytest.mark.parametrize("other", ["tuned", "tune/b-2"])
def test_runs_made_differently_share_no_table(
    tmp_path: Path, dataset: Path, make: Callable, other: str, change: dict, named: str
) -> None:
    write_run(tmp_path / "runs", dataset, "initial" if other == "tuned" else "tune/a-1", 0, 0.5)
    write_run(tmp_path / "runs", dataset, other, 0, 0.5, **change)
    code, message = make(tmp_path / "runs", tmp_path / "out")
    assert code == 2 and message.count("\n") == 1
    assert named in message and "cannot share a table" in message
    assert not (tmp_path / "out").exists()


def test_our_model_may_have_another_budget_but_not_another_test_split(
    tmp_path: Path, dataset: Path
) -> None:
    write_run(tmp_path, dataset, "tuned", 0, 0.5)
    best = write_run(tmp_path, dataset, "best", 0, 0.5, epochs=3)
    tables.check_tables(collect.find_runs(tmp_path)[0])
    row = json.loads((best / "testing.json").read_text())[0]
    (best / "testing.json").write_text(json.dumps([row | {"digest": "another"}]))
    with pytest.raises(UserError, match="test data"):
        tables.check_tables(collect.find_runs(tmp_path)[0])


def test_seeds_of_one_experiment_must_be_trained_alike(tmp_path: Path, dataset: Path) -> None:
    write_run(tmp_path, dataset, "tune/a-1", 0, 0.5)
    write_run(tmp_path, dataset, "tune/a-1", 1, 0.5, learning_rate=0.1)
    with pytest.raises(UserError, match="learning_rate"):
        collect.find_runs(tmp_path)


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json", "environment.json"])
def test_a_damaged_file_is_named(tmp_path: Path, dataset: Path, make: Callable, name: str) -> None:
    folder = write_run(tmp_path / "runs", dataset, "tune/a-1", 0, 0.5)
    (folder / name).write_text((folder / name).read_text()[:-9])
    code, message = make(tmp_path / "runs", tmp_path / "out")
    assert code == 2 and message.count("\n") == 1 and str(folder / name) in message


def test_no_runs_is_one_line(tmp_path: Path, make: Callable) -> None:
    code, message = make(tmp_path, tmp_path / "out")
    assert code == 2 and message.startswith(f"error: {tmp_path}: holds no finished run")
