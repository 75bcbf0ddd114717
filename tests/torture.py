"""Kill training runs at random moments, resume them, compare them with runs left alone.

    python tests/torture.py [--count 50] [--seed 0] [--jobs 2]

`make torture` runs it. Each run is a real process, killed by SIGKILL between its first step and
its end, continued with --resume, killed again or not, until it is done. Then weights, optimizer,
scheduler, best.pt, metrics.jsonl and TensorBoard must be those of the uninterrupted run bit for
bit, but for what a clock says. Every other kill waits for a file that is being written.
"""

import argparse
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parent.parent
PLAIN = {
    "encoder": "[[4, 3], [8, 3]]",
    "decoder": "[[8, 3], [6, 3]]",
    "loss": "{cross_entropy: 1, dice_per_class: 1}",
    "images_per_epoch": 32,
    "batch_size": 4,
    "epochs": 12,
    "device": "cpu",
    "precision": "float32",
}
RANDOM = {  # all that draws random numbers in a step
    "dropout": 0.3,
    "crop": 16,
    "crop_on_objects": 0.5,
    "horizontal_flip": 0.5,
    "vertical_flip": 0.5,
    "blur": 0.5,
    "jitter": 0.5,
}
CONFIGS = {
    "plain": PLAIN,
    "random": PLAIN | RANDOM,
    "one-cycle": PLAIN | {"schedule": "one_cycle"},
    "uneven": PLAIN | {"images_per_epoch": 27, "batch_size": 5},
    "random-seed1": PLAIN | RANDOM | {"schedule": "one_cycle", "images_per_epoch": 30, "seed": 1},
}
CLOCK = ("train_seconds", "images_per_s", "seconds", "peak_memory_mib", "digest")


class Outcome(NamedTuple):
    """What happened to one run until it was done."""

    kills: int
    while_writing: int
    resumes: int
    differences: list[str]


def start(config: dict, data: Path, run_dir: Path) -> subprocess.Popen:
    """Start or resume a training process, with the scripts that lie beside its run directory."""
    command = [sys.executable, "train.py", "--config", "configs/default.yaml", "--resume"]
    command += ["--data", data, "--run-dir", run_dir, "--set"]
    command += [f"{key}={value}" for key, value in config.items()]
    output = open(run_dir.with_suffix(".log"), "a")  # noqa: SIM115 (the process holds it)
    # One thread: batches this small gain nothing from more, and the runs go side by side.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    scripts = run_dir.parent / "scripts"
    return subprocess.Popen(command, cwd=scripts, env=environment, stdout=output, stderr=output)


def written(path: Path) -> int:
    """When a file was written last, 0 if it is not there."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def kill_after(
    process: subprocess.Popen, run_dir: Path, before: int, delay: float, writing: bool
) -> bool:
    """Kill a run so many seconds after its first step began; whether that was before its end.

    Args:
        process: the run.
        run_dir: its directory.
        before: when its environment.json, written right before the first step, was written by the
            process before this one.
        delay: in seconds.
        writing: wait after that until a file is being written.
    """
    while process.poll() is None and written(run_dir / "environment.json") == before:
        time.sleep(0.002)
    time.sleep(delay)
    while writing and process.poll() is None and not any(run_dir.glob("*.partial")):
        pass  # a file of this size is written within a millisecond or two
    process.send_signal(signal.SIGKILL)  # of no effect on a process that has ended and is reaped
    return process.wait() == -signal.SIGKILL


def plain(value: object) -> object:
    """To be compared with ==, bit for bit; without what a clock says."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if key not in CLOCK}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def events(run_dir: Path) -> dict:
    """(step, value) of every scalar and step of every picture that TensorBoard shows."""
    board = EventAccumulator(str(run_dir), size_guidance={"scalars": 0, "images": 0}).Reload()
    shown: dict = {
        tag: [(event.step, 0 if tag in CLOCK else event.value) for event in board.Scalars(tag)]
        for tag in board.Tags()["scalars"]
    }
    for tag in board.Tags()["images"]:
        shown[tag] = [(event.step, event.encoded_image_string) for event in board.Images(tag)]
    return shown


def state_of(run_dir: Path) -> dict[str, object]:
    """All that must be the same in a run that was killed and in one that was not."""
    history = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    last, best = (
        plain(torch.load(run_dir / name, weights_only=True)) for name in ("last.pt", "best.pt")
    )
    assert isinstance(last, dict) and isinstance(best, dict)
    return {
        **{f"last.pt: {key}": value for key, value in last.items()},
        **{f"best.pt: {key}": value for key, value in best.items()},
        "metrics.jsonl": plain(history),
        "epochs in metrics.jsonl": [entry["epoch"] for entry in history],
        **{f"TensorBoard: {tag}": shown for tag, shown in events(run_dir).items()},
        "predictions.png": (run_dir / "predictions.png").read_bytes(),
        "summary.json": plain(json.loads((run_dir / "summary.json").read_text())),
    }


def differences(killed: dict[str, object], whole: dict[str, object]) -> list[str]:
    """Names of what differs."""
    return sorted(key for key in killed.keys() | whole.keys() if killed.get(key) != whole.get(key))


def run_alone(config: dict, data: Path, run_dir: Path) -> tuple[dict[str, object], float]:
    """Train without interruption: its state, and seconds from the first step to the end."""
    run_dir.mkdir()
    if start(config, data, run_dir).wait() != 0:
        sys.exit(run_dir.with_suffix(".log").read_text() + "\nerror: a run left alone failed")
    begun, ended = (run_dir / name for name in ("environment.json", "summary.json"))
    epochs = [entry[0] for entry in events(run_dir)["loss/validation"]]
    assert epochs == list(range(1, config["epochs"] + 1)), epochs
    return state_of(run_dir), (written(ended) - written(begun)) / 1e9


def torture(
    config: dict, data: Path, run_dir: Path, whole: dict, seconds: float, kills: int, seed: int
) -> Outcome:
    """Kill a run so many times at most, let it end, and compare it."""
    run_dir.mkdir()
    chance = random.Random(seed)
    killed = while_writing = resumes = 0
    for attempt in range(kills + 1):
        before = written(run_dir / "environment.json")
        process = start(config, data, run_dir)
        resumes += attempt > 0
        if attempt == kills:
            process.wait()
        else:
            # Up to the rest of the run and more than a kill's share of it: some come too late.
            delay = chance.uniform(0, 1.2 * seconds / kills)
            if not kill_after(process, run_dir, before, delay, writing=chance.random() < 0.5):
                break
            killed += 1
            while_writing += any(run_dir.glob("*.partial"))
    if process.returncode != 0:
        log = run_dir.with_suffix(".log").read_text().splitlines()
        return Outcome(killed, while_writing, resumes, [f"exit {process.returncode}: {log[-1]}"])
    return Outcome(killed, while_writing, resumes, differences(state_of(run_dir), whole))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=50, help="kills")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, len(CONFIGS)))
    args = parser.parse_args()
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of every purge
    with (
        tempfile.TemporaryDirectory(prefix="torture-") as folder,
        ThreadPoolExecutor(max(args.jobs, 1)) as pool,
    ):
        data, scripts = Path(folder, "data"), Path(folder, "scripts")
        # A copy: to edit a script in the minutes that this takes must not look like a difference.
        shutil.copytree(ROOT / "configs", scripts / "configs")
        for path in ROOT.glob("*.py"):
            shutil.copy(path, scripts)
        command = [sys.executable, "data.py", "generate", "--sequences", *"322", "--size", "32"]
        subprocess.run([*command, "--out", data], cwd=scripts, check=True, capture_output=True)
        names = list(CONFIGS)
        first, *others = names  # the first builds the cache of the data, for all
        alone = {first: run_alone(CONFIGS[first], data, Path(folder, first))}
        done = pool.map(lambda n: run_alone(CONFIGS[n], data, Path(folder, n)), others)
        alone |= dict(zip(others, done, strict=True))

        total = {name: Outcome(0, 0, 0, []) for name in names}
        number = 0
        while (left := args.count - sum(outcome.kills for outcome in total.values())) > 0:
            # A round: each config once, up to four kills each, in all no more than are left.
            jobs = []
            for name in names:
                kills = min(left, 1 + number % 4)
                if kills:
                    left, number = left - kills, number + 1
                    target = Path(folder, f"{name}-{number}")
                    seed = args.seed * 1_000_003 + number
                    jobs.append((CONFIGS[name], data, target, *alone[name], kills, seed, name))
            outcomes = pool.map(lambda job: (job[-1], torture(*job[:-1])), jobs)
            for name, outcome in outcomes:
                total[name] = Outcome(*(a + b for a, b in zip(total[name], outcome, strict=True)))
        for name, outcome in total.items():
            print(
                f"{name:<14}{outcome.kills:>4} kills ({outcome.while_writing} within a write), "
                f"{outcome.resumes:>3} resumes, {len(outcome.differences)} differences"
            )
            for difference in outcome.differences:
                print(f"  differs: {difference}")
    found = sum(len(outcome.differences) for outcome in total.values())
    kills, resumes = (sum(o[i] for o in total.values()) for i in (0, 2))
    print(f"{kills} kills, {resumes} resumes, {found} differences")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
