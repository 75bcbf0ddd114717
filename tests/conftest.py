"""What all test files share: a small data set, and scripts run as a user runs them."""

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# One thread, here and in the scripts that tests start: networks this small gain nothing from more,
# and on a busy machine threads that wait for each other cost minutes.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest

# Nothing that imports torch: pytest's first process reads this file before it starts the others.
from common import ROOT, code_digest, run
from config import load_config
from tools.generate import generate

# Settings of a run of a second: 3 sequences of 32×32, a small network.
TINY = {
    "encoder": "[[8, 3], [16, 3]]",
    "decoder": "[[16, 3], [8, 3]]",
    "loss": "{cross_entropy: 1, dice_per_class: 1}",
    "images_per_epoch": "16",
    "batch_size": "8",
    "epochs": "2",
}


# The files that take longest, the slowest first.
SLOW = (
    "test_readme.py",
    "test_predict.py",
    "test_train_ends.py",
    "test_train.py",
    "test_doctor.py",
    "test_generate.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the slow files: at the end, one core would wait for the other."""

    def place(item: pytest.Item) -> int:
        name = item.path.name
        return SLOW.index(name) if name in SLOW else len(SLOW)

    items.sort(key=place)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generate a data set of 3, 2 and 2 sequences at 32×32. Read-only: copy it to change it."""
    root = tmp_path_factory.mktemp("data") / "set"
    generate(root, {"training": 3, "validation": 2, "testing": 2}, size=32, seed=0, frames=12)
    return root


@pytest.fixture(scope="session", autouse=True)
def digest_once() -> Iterator[None]:
    """Compute the digest of the code once: it takes as long as an epoch of a tiny run."""
    digest = code_digest()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.code_digest", lambda: digest)
        patch.setattr("table.code_digest", lambda: digest)
        yield


def config_for(root: Path, **values: object) -> dict:
    """Load the default config for a data set, some keys given: `config_for(root, classes=…)`."""
    config = load_config([ROOT / "configs/afo.yaml"], [f"data={root}"])
    config.update(values)
    return config


def tiny(root: Path, **values: object) -> list[str]:
    """List the overrides of a run of a second: `--set` of a script, or for `load_config`."""
    return [f"{key}={value}" for key, value in (TINY | {"data": root} | values).items()]


@pytest.fixture(scope="session")
def script() -> Callable[..., subprocess.CompletedProcess]:
    """`script("data.py", "check", folder)` runs a script of the project as a user does."""

    def run(*args: object, timeout: float = 600, **env: str) -> subprocess.CompletedProcess:
        command = [sys.executable, *map(str, args)]
        options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": timeout}
        return subprocess.run(command, env=os.environ | env, **options)

    return run


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable:
    """`call(main, *arguments)`: a script's main in this process: (exit code, stdout, stderr)."""

    def call_main(main: Callable[[], None], *args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, args)])
        code = 0
        try:
            run(main)
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return call_main


def corruptions(data: bytes, number: int = 200) -> Iterator[bytes]:
    """Yield damaged copies of a file: random bytes flipped, cut, inserted or zeroed."""
    rng = random.Random(0)
    for _ in range(number):
        copy, start = bytearray(data), rng.randrange(len(data))
        stop = min(len(data), start + rng.choice((1, 2, 16, 256)))
        noise = rng.randbytes(stop - start)
        kind = rng.choice(("flip", "cut", "insert", "zero", "end"))
        if kind == "flip":
            copy[start:stop] = noise
        elif kind == "cut":
            del copy[start:stop]
        elif kind == "insert":
            copy[start:start] = noise
        elif kind == "zero":
            copy[start:stop] = bytes(stop - start)
        else:
            del copy[start:]
        yield bytes(copy)


def write_checkpoint(folder: Path, data: Path, name: str, seed: int, **values: object) -> Path:
    """Write best.pt of a small model with random weights: poor, but it predicts several classes."""
    import torch

    from checkpoints import save_checkpoint
    from model import build_model

    config = config_for(data, name=name, seed=seed, precision="float32")
    config |= {"encoder": [[4, 3]], "decoder": [[6, 3]]} | values
    cost = config.pop("cost", {"images_seen": 1000 + seed, "train_seconds": 60.0 + seed})
    torch.manual_seed(seed)
    model = build_model(config)
    model(torch.rand(8, config["in_channels"], 32, 32))  # fills the statistics of batch norm
    checkpoint = {"config": config, "model": model.state_dict(), "cost": cost}
    save_checkpoint(folder / "best.pt", checkpoint)
    return folder / "best.pt"


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the files of figures empty: rendering takes most of the time of a report."""

    def touch(figure: object, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    monkeypatch.setattr("figures.save", touch)
