"""Writing files."""

import contextlib
import os
from pathlib import Path

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
