"""Kill training again and again, resume it, and compare the end with a run left alone.

    make torture        (python tests/torture.py [--kills 50] [--seed 0])

Half of the kills come at random moments, half while a file is being written, which on a fast
machine is too short a moment to be met by chance.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conftest import tiny
from test_train import RANDOM, lines, load, plain

from common import ROOT
from tools.generate import generate


def start(data: Path, run_dir: Path, seed: int) -> subprocess.Popen:
    """Start train.py, or go on with what it left."""
    values = dict(RANDOM)
    values["epochs"] = 6
    values["seed"] = seed
    command = [sys.executable, "train.py", "--config", "configs/tuned.yaml", "--resume"]
    command += ["--run-dir", str(run_dir), "--set"]
    command += tiny(data, **values)
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)


def wait_for_a_moment(process: subprocess.Popen, seconds: float) -> None:
    """Wait a while, or until the process ends."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return


def wait_for_a_write(process: subprocess.Popen, run_dir: Path, number: int) -> None:
    """Wait until the process writes its `number`-th file, or ends."""
    seen = None  # the file that is being written
    while process.poll() is None:
        writing = sorted(path.name for path in run_dir.glob("*.partial"))
        if writing and writing != seen:
            number -= 1
            if number == 0:
                return
        seen = writing
        time.sleep(0.0005)


def outcome(run_dir: Path) -> list:
    """List all that a run ended with, but what a clock says."""
    last = plain(load(run_dir / "last.pt"))
    best = plain(load(run_dir / "best.pt"))
    return [last, best, plain(lines(run_dir))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    kills = 0
    runs = 0
    differing = 0
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data")
        generate(data, {"training": 3, "validation": 1, "testing": 1}, size=32, seed=0)
        while kills < args.kills:
            alone = Path(folder, f"alone{runs}")
            killed = Path(folder, f"killed{runs}")
            started = time.perf_counter()
            if start(data, alone, runs).wait() != 0:
                sys.exit("error: the run that is left alone failed")
            whole = time.perf_counter() - started

            finished = False
            while not finished:
                process = start(data, killed, runs)
                if kills >= args.kills:
                    process.wait()
                elif rng.random() < 0.5:
                    # Mostly after the imports, which take most of so short a run.
                    wait_for_a_moment(process, rng.uniform(0.4, 1.05) * whole)
                else:
                    wait_for_a_write(process, killed, number=rng.randint(1, 5))
                if process.poll() is None:
                    process.kill()
                    process.wait()
                    kills += 1
                elif process.returncode == 0:
                    finished = True
                else:
                    sys.exit(f"error: a run failed by itself after {kills} kills")

            same = outcome(alone) == outcome(killed)
            runs += 1
            differing += not same
            print(f"run {runs}: {kills} kills so far, {'the same' if same else 'DIFFERS'}")
    print(f"{kills} kills in {runs} runs, {differing} with other final weights")
    sys.exit(differing > 0)


if __name__ == "__main__":
    main()
