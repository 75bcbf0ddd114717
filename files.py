"""Writing files, and the lock of a run directory."""

import contextlib
import fcntl
import os
from pathlib import Path
from typing import TextIO

from errors import UserError


def write_atomically(path: Path, data: bytes, keep: Path | None = None) -> None:
    """Write a file whole or not at all.

    Args:
        path: the file; its folder is made if need be.
        data: its content.
        keep: where the file that was there before is kept; None: it is replaced.

    Raises:
        UserError: the disk is full or the folder read-only; the file that was there is left.
    """
    partial = path.parent / (path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            path.replace(keep)
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); make room, or write elsewhere"
        ) from None


def lock_run(run_dir: Path) -> TextIO:
    """Take a run directory for this process; UserError if another has it or it is read-only."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = open(run_dir / "lock", "w")  # noqa: SIM115 (open as long as it is held)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{run_dir}: another process works here; give another folder") from None
    except OSError as error:
        raise UserError(f"{run_dir}: cannot be written ({error.strerror})") from None
    return lock
