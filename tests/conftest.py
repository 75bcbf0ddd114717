"""What all test files share: a small data set and a way to run a script as a user does."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# One thread, here and in the scripts that tests start: networks this small gain nothing from more,
# and on a busy machine threads that wait for each other cost minutes.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest

# after the line above, which torch reads as it starts
import errors
from config import load_config
from generate import generate

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drawn data set of 3, 2 and 2 sequences at 32×32. Read-only: copy it to change it."""
    root = tmp_path_factory.mktemp("data") / "set"
    generate(root, {"training": 3, "validation": 2, "testing": 2}, size=32, seed=0, workers=1)
    return root


def config_for(root: Path, **values: object) -> dict:
    """The default config for a data set, some keys given: `config_for(root, classes=CLASSES)`."""
    return load_config([], [f"data={root}"]) | values


@pytest.fixture(scope="session")
def script() -> Callable[..., subprocess.CompletedProcess]:
    """`script("data.py", "check", folder)` runs a script of the project as a user does."""

    def run(*args: object, timeout: float = 120) -> subprocess.CompletedProcess:
        command = [sys.executable, *map(str, args)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)

    return run


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable:
    """`call(main, *arguments)`: a script's main in this process: (exit code, stdout, stderr)."""

    def run(main: Callable[[], None], *args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, args)])
        code = 0
        try:
            errors.run(main)
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module", autouse=True)
def signals_as_before() -> Iterator[None]:
    """Training in this process catches signals, which the tests after it must not."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
