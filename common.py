"""What every script shares: errors in one line, whole files, the identity of the training code.

Imported before torch: libgomp reads its variables when torch loads it.
"""

import contextlib
import errno
import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

# Two trainings on the same cores share them evenly only if their threads stay where they are and
# spin but briefly while they wait. Nowhere else: a pool's workers, or those who drive the GPUs of
# one machine, would all stay on the first core.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
computes = Path(sys.argv[0]).name in ("train.py", "evaluate.py")
if computes and "OMP_NUM_THREADS" not in os.environ and not Path("/dev/nvidia0").exists():
    os.environ.setdefault("OMP_PROC_BIND", "true")

ROOT = Path(__file__).resolve().parent
SPLITS = ("training", "validation", "testing")
TRAINING_CODE = ("train.py", "model.py", "losses.py", "augment.py", "data.py")


class UserError(Exception):
    """A mistake in the input. Its one line says which file or key, what is wrong and the fix."""


def run(main: Callable[[], None]) -> None:
    """Call `main`; a `UserError` or an unusable file is printed in one line, exit code 2."""
    # All else is a bug and keeps its trace. torchrun ends all processes when one ends: all but
    # rank 0 wait, since most errors are the same everywhere or follow from the first.
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # as in: python evaluate.py … | head
        os._exit(141)
    except Exception as error:
        time.sleep(5 if os.environ.get("RANK", "0") != "0" else 0)
        if isinstance(error, OSError) and (error.filename or error.errno == errno.ENOSPC):
            error = UserError(f"{error.filename or 'disk'}: {error.strerror}")
        if not isinstance(error, UserError):
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


@contextlib.contextmanager
def reading(source: object, advice: str = "replace it") -> Iterator[None]:
    """Turn whatever goes wrong while `source` is read into a UserError that names it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 (damaged files fail in too many ways to list)
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        reason = " ".join(reason.split())[:200]
        raise UserError(f"{source}: cannot be read ({reason}); {advice}") from None


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; its folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:  # a full disk is reported without a name
        partial.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror}); make room") from None


def require(values: dict, kinds: dict[str, type]) -> None:
    """Raise KeyError or ValueError unless a mapping has these keys, with values of these types."""
    for key, kind in kinds.items():
        if not isinstance(values[key], kind):
            raise ValueError(f"{key} is {values[key]!r}")


def code_digest() -> str:
    """Twelve hexadecimal digits that change with the code that decides what a run learns."""
    code = b"".join((ROOT / name).read_bytes() for name in TRAINING_CODE)
    return hashlib.sha256(code).hexdigest()[:12]
