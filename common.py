"""Share what every script needs: one-line errors, whole files, the digest of the code."""

import ast
import contextlib
import errno
import fcntl
import gc
import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent
SPLITS = ("training", "validation", "testing")
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)  # the disk itself, or what the user may have of it
CODE_OF_SCORES = (  # the files whose code decides scores
    "augment.py",
    "checkpoints.py",
    "config.py",
    "data.py",
    "evaluate.py",
    "images.py",
    "losses.py",
    "machine.py",
    "masks.py",
    "metrics.py",
    "model.py",
    "pairs.py",
    "patterns.py",
    "processes.py",
    "runs.py",
    "schedule.py",
    "train.py",
)


class UserError(Exception):
    """A mistake in the input. Its one line says which file or key, what is wrong and the fix."""


def run(main: Callable[[], None]) -> None:
    """Call `main`; print a `UserError` or a full disk in one line and exit with code 2.

    As shells expect, the code is 130 after Ctrl-C, and 141 if nobody reads stdout any more. Every
    other exception is a mistake in the code and keeps its traceback.
    """
    try:
        main()
        flush_stdout()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # as in: python evaluate.py … | head
        os._exit(141)
    except Exception as error:
        if os.environ.get("RANK", "0") != "0":
            # torchrun ends all processes as soon as one ends. Most errors are the same in each, or
            # follow from the first one's: give it time to print.
            time.sleep(5)
        if isinstance(error, UserError):
            message = str(error)
        elif isinstance(error, OSError) and error.errno in DISK_IS_FULL:
            message = f"disk: {error.strerror}"
        else:
            raise
        print(f"error: {message}", file=sys.stderr, flush=True)
        flush_stdout()
        sys.exit(2)
    finally:
        # At its end Python looks for garbage once more, which takes most of a second after the
        # import of torch. It does not look at frozen objects; the system frees their memory.
        gc.freeze()


def flush_stdout() -> None:
    """Write what was printed; exit with 141 if nobody reads it. Python would do so too late."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os._exit(141)


def user_path(text: str) -> Path:
    """Make a path of what a user typed. ~ is the home folder, which a shell leaves in quotes."""
    return Path(text).expanduser()


@contextlib.contextmanager
def reading(source: object, advice: str = "replace it") -> Iterator[None]:
    """Turn whatever goes wrong while `source` is read into a UserError that names it.

    Only for the reading of files and values: a mistake in code that is called in here would lose
    its traceback.
    """
    try:
        yield
    except UserError:
        raise
    except MemoryError:  # also of damaged files, which claim to be huge
        reason = "not enough memory: it is too large, or damaged"
        raise UserError(f"{source}: cannot be read ({reason}); {advice}") from None
    except Exception as error:  # noqa: BLE001 (damaged files fail in too many ways to list)
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        reason = " ".join(reason.split())[:200]
        raise UserError(f"{source}: cannot be read ({reason}); {advice}") from None


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; make its folder if need be."""
    # Two processes may write the same file at once: each has a partial file of its own.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:  # the error of a full disk, for one, does not name the file
        with contextlib.suppress(OSError):  # as a name that is too long
            partial.unlink(missing_ok=True)
        advice = "make room" if error.errno in DISK_IS_FULL else "give another path"
        raise UserError(f"{path}: cannot be written ({error.strerror}); {advice}") from None


@contextlib.contextmanager
def naming_full_disk(folder: Path) -> Iterator[None]:
    """Turn the error of a full disk, which names no file, into a UserError that names a folder."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_IS_FULL:
            raise
        raise UserError(f"{folder}: cannot be written ({error.strerror}); make room") from None


@contextlib.contextmanager
def wait_for_lock(path: Path) -> Iterator[None]:
    """Wait until no other process holds the lock of this file, and hold it."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # closing the file gives it back
        yield


def require(values: dict, kinds: dict[str, type | tuple[type, ...]]) -> None:
    """Raise KeyError or ValueError unless `values` has these keys, with values of these types."""
    if not isinstance(values, dict):
        raise ValueError("it holds no keys with values")
    for key, kind in kinds.items():
        if not isinstance(values[key], kind):
            raise ValueError(f"{key} is {values[key]!r}")


def code_digest(names: tuple[str, ...] = CODE_OF_SCORES) -> str:
    """Compute twelve hexadecimal digits that change with the code of these files.

    Comments, docstrings, layout and the version of Python do not count.
    """
    digest = hashlib.sha256()
    for name in names:
        path = ROOT / name
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        for node in ast.walk(tree):
            has_body = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            if has_body and ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:] or [ast.Pass()]
        digest.update(str(as_lists(tree)).encode())
    return digest.hexdigest()[:12]


def as_lists(node: object) -> list | str:
    """Turn a syntax tree into lists and strings that are the same in every version of Python.

    Fields that are empty are left out, since newer versions add some.
    """
    if isinstance(node, ast.AST):
        parts = [type(node).__name__]
        for name, value in ast.iter_fields(node):
            if value not in (None, []):
                parts += [name, as_lists(value)]
        return parts
    if isinstance(node, list):
        return [as_lists(item) for item in node]
    return repr(node)
