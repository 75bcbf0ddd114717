"""Tests of training in two processes: it is what one process with the whole batch does.

Each start of torchrun costs seconds, so there are three, and each serves several tests.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks
import torch
from ranks import ROOT, settings

from checkpoint import load_checkpoint, load_last, save_checkpoint
from config import load_config
from evaluate import evaluate_checkpoint
from seeds import seeded
from train import train

CPU = torch.device("cpu")
CLOCK = ("train_seconds", "images_per_s", "digest")


def start(script: str, *arguments: object) -> subprocess.Popen:
    """Start a script in two processes, as a user does."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.Popen(
        [*launch, script, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_training(data: Path, run_dir: Path, *more: str) -> subprocess.Popen:
    config = ("--config", "configs/default.yaml", "--run-dir", run_dir)
    return start("train.py", *config, "--set", *settings(data), *more)


def end(process: subprocess.Popen) -> tuple[list[str], list[str]]:
    """Wait for a process; what our code printed to stdout, and the errors it named."""
    try:
        output, errors = process.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        process.terminate()  # and with it what it started
        raise
    return output.splitlines(), [
        line for line in errors.splitlines() if line.startswith(("error:", "interrupted"))
    ]


def history(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def plain(value: object) -> object:
    """To be compared with ==, bit for bit; without what a clock says."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.tolist()
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items() if key not in CLOCK}
    return [plain(v) for v in value] if isinstance(value, list) else value


# ---- the parts: a step, batch norm, what all agree on


@pytest.fixture(scope="module")
def parts(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What tests/ranks.py left, which ends at a run directory that is taken."""
    out = tmp_path_factory.mktemp("ranks")
    process = start("tests/ranks.py", dataset, out)
    output, errors = end(process)
    assert sum("resuming after step" in line for line in output) == 1
    [error] = errors  # of two processes, of which one alone asks for the directory
    assert error.startswith(f"error: {out}/taken: another process works here")
    assert process.returncode != 0
    return out


@pytest.fixture(scope="module")
def results(parts: Path) -> list[dict]:
    return [torch.load(parts / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("total", [1, 6, 7])
def test_step_is_that_of_the_whole_batch(results: list[dict], total: int) -> None:
    """Loss, logits, gradients, statistics and new weights; for a batch of one, too."""
    first, second = (result[f"step of {total}"] for result in results)
    shares = [first.pop("part").tolist(), second.pop("part").tolist()]
    assert shares == {1: [[0], [0]], 6: [[0, 1, 2], [3, 4, 5]], 7: [[0, 1, 2, 3], [4, 5, 6]]}[total]
    assert plain(first) == plain(second)
    expected = ranks.step(total)
    assert torch.equal(first["masks"], expected["masks"])
    assert list(first["model"]) == list(expected["model"])
    if total == 1:  # both processes have the same image, which the unbiased variance counts twice
        for statistics in (first["model"], expected["model"]):
            for name in [name for name in statistics if "running_var" in name]:
                del statistics[name]
    expected.pop("part")
    torch.testing.assert_close(first, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.02)], ids=str
)
def test_batch_norm_is_that_of_the_whole_batch(
    results: list[dict], dtype: torch.dtype, tolerance: float
) -> None:
    expected = ranks.normalise(dtype)
    for result in results:
        result = result[str(dtype)]
        assert result["output"].dtype == result["gradient"].dtype == dtype
        torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


def test_largest_number_and_every_error_is_that_of_all(results: list[dict]) -> None:
    assert [result["agreed"] for result in results] == [11, 11]
    assert [result["error"] for result in results] == ["of one", "of one"]


def test_signal_to_one_process_stops_both_and_the_run_goes_on_from_there(parts: Path) -> None:
    """Augmented and with dropout: every process draws its own numbers again."""
    stopped = [torch.load(parts / f"interrupted{rank}.pt") for rank in (0, 1)]
    assert [process["code"] for process in stopped] == [143, 143]
    seeds = [process["seeds"] for process in stopped]
    assert seeds[0] == [seeded(0, "step", number) for number in range(4)]  # those of one process
    assert len({*seeds[0], *seeds[1]}) == 8
    assert len(history(parts / "alone")) == 2
    assert plain(history(parts / "interrupted")) == plain(history(parts / "alone"))
    for name in ("last.pt", "best.pt"):
        alone, resumed = (
            plain(load_checkpoint(parts / run / name, CPU)) for run in ("alone", "interrupted")
        )
        assert alone == resumed


# ---- a run


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder of a run of two epochs in two processes, and what it printed."""
    folder = tmp_path_factory.mktemp("distributed") / "run"
    process = start_training(dataset, folder)
    output, errors = end(process)
    assert (process.returncode, errors) == (0, [])
    return folder, output


def test_metrics_are_those_of_one_process(
    run: tuple[Path, list[str]], dataset: Path, tmp_path: Path
) -> None:
    """But for rounding, of which Adam makes whole steps where a gradient is nothing else.

    Those are of the biases before batch norm; they matter only until its statistics have followed.
    """
    config = load_config([ROOT / "configs/default.yaml"], settings(dataset))
    train(config, tmp_path, resume=False)
    both = history(run[0]), history(tmp_path)
    assert len(both[0]) == 2
    for ours, expected in zip(*both, strict=True):
        assert ours["images_seen"] == expected["images_seen"]
        assert ours["training"]["loss"] == pytest.approx(expected["training"]["loss"], rel=1e-5)
        assert ours["validation"]["loss"] == pytest.approx(expected["validation"]["loss"], rel=1e-4)
        for split in ("training", "validation"):
            for key in ("mean_iou", "mean_dice", "pixel_accuracy"):
                assert ours[split][key] == pytest.approx(expected[split][key], abs=1e-3)


def test_scores_of_the_best_checkpoint_are_those_of_evaluate(run: tuple[Path, list[str]]) -> None:
    """Exactly: the same batches, counted by two processes."""
    best = load_checkpoint(run[0] / "best.pt", CPU)
    row = evaluate_checkpoint(run[0] / "best.pt", None, "validation", "cpu")
    assert {key: row[key] for key in best["validation"] if key != "loss"} == {
        key: value for key, value in best["validation"].items() if key != "loss"
    }
    counted = sum(map(sum, row["confusion_matrix"]))
    assert row["images"] > 32 and counted == row["images"] * 32 * 32


def test_one_process_writes_and_prints(run: tuple[Path, list[str]]) -> None:
    folder, output = run
    for epoch in (1, 2):
        assert sum(f"epoch {epoch}/2" in line for line in output) == 1
    assert sum(line.startswith("best epoch") for line in output) == 1
    # The epochs and, at the end, the hyperparameters; the last but one part is the process.
    events = [path.name.split(".") for path in folder.glob("events.out.tfevents.*")]
    assert len(events) == 2 and len({parts[-2] for parts in events}) == 1
    assert json.loads((folder / "environment.json").read_text())["processes"] == 2
    assert not list(folder.glob("*.partial"))


def test_one_process_goes_on_with_the_run_of_two(
    run: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """Which proves the names and shapes in its checkpoint, the optimizer's as well."""
    copy = shutil.copytree(run[0], tmp_path / "copy")
    last = load_last(copy, CPU)
    config = last["config"] | {"epochs": 3}
    save_checkpoint(copy / "last.pt", last | {"config": config})
    train(config, copy, resume=True)
    assert plain(history(copy)[:2]) == plain(history(run[0]))
    assert load_last(copy, CPU)["step"] == 9


# ---- how it ends before its end


def test_run_stops_when_torchrun_does(dataset: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = start_training(dataset, run_dir, "epochs=100000")
    while not (run_dir / "metrics.jsonl").exists():  # in the middle of training
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, errors = end(process)
    assert process.returncode != 0 and errors == []
    [line] = [line for line in output if "stopped after step" in line]
    last = load_last(run_dir, CPU)
    assert f"step {last['step']};" in line
    assert len(list(run_dir.glob("events.out.tfevents.*"))) == 1
    assert len(history(run_dir)) == len(last["history"])
