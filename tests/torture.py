"""Kill training runs at random moments, resume them, compare them with runs left alone.

    python tests/torture.py [--kills 50] [--seed 0]

`make torture` runs it. Each run is a real process, killed by SIGKILL at a random moment between its
start and the time that a whole run takes, and gone on with by --resume until it is done. The final
weights, optimizer state and scores must be those of the uninterrupted run bit for bit.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import ROOT

from conftest import tiny
from test_train import RANDOM, lines, load, plain

from tools.generate import generate


def start(data: Path, run_dir: Path, seed: int) -> subprocess.Popen:
    """Start train.py, or go on with what it left."""
    command = [sys.executable, "train.py", "--config", "configs/tuned.yaml", "--resume"]
    command += ["--run-dir", run_dir, "--set", *tiny(data, **RANDOM | {"epochs": 6, "seed": seed})]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)


def outcome(run_dir: Path) -> list:
    """List all that a run ended with, but what a clock says."""
    checkpoints = (plain(load(run_dir / name)) for name in ("last.pt", "best.pt"))
    return [*checkpoints, plain(lines(run_dir))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    rng, kills, runs, differing = random.Random(args.seed), 0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data")
        generate(data, {"training": 3, "validation": 1, "testing": 1}, size=32, seed=0)
        while kills < args.kills:
            alone, killed = Path(folder, f"alone{runs}"), Path(folder, f"killed{runs}")
            started = time.perf_counter()
            assert start(data, alone, runs).wait() == 0
            whole = time.perf_counter() - started
            done = False
            while not done:
                process = start(data, killed, runs)
                try:
                    # Mostly after the imports, which take most of so short a run.
                    limit = rng.uniform(0.4, 1.05) * whole if kills < args.kills else None
                    done = process.wait(limit) == 0
                    assert done, "training failed by itself"
                except subprocess.TimeoutExpired:
                    process.kill(), process.wait()
                    kills += 1
            differs = outcome(alone) != outcome(killed)
            runs, differing = runs + 1, differing + differs
            print(f"run {runs}: {kills} kills so far, {'DIFFERS' if differs else 'the same'}")
    print(f"{kills} kills in {runs} runs, {differing} with other final weights")
    sys.exit(differing > 0)


if __name__ == "__main__":
    main()
