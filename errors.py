"""The one exception for mistakes a user can mend, and how a script ends."""

import os
import signal
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake in the input. Its one line says which file or key, what is wrong and the fix."""


def run(main: Callable[[], None]) -> None:
    """Call `main`; report what a user can mend as one line on stderr with exit code 2.

    That is a `UserError`, what the operating system refuses, and memory that does not suffice.
    Ctrl-C ends with code 130, a reader that closed the pipe, as `head` does, with 1 and no word.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream:  # not closed; a name, or a ×, may be what the terminal has no letter for
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
        print(end="", flush=True)  # here, where a closed pipe or a full disk is caught
        return
    except UserError as error:
        text = str(error)
    except OSError as error:
        if not error.errno:
            raise
        if error.filename is None:  # standard output, which Python would flush once more at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if isinstance(error, BrokenPipeError):
            sys.exit(1)
        text = f"{error.filename or 'standard output'}: {error.strerror}"
    except (MemoryError, RuntimeError) as error:
        first = (str(error).splitlines() or [""])[0]
        known = ("out of memory", "can't allocate memory", "not enough memory")  # of PyTorch
        if not isinstance(error, MemoryError) and not any(text in first for text in known):
            raise
        text = f"out of memory: lower batch_size or crop, or use smaller images ({first[:200]})"
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    print(f"error: {text}", file=sys.stderr)
    sys.exit(2)


def catch_signals() -> list[int]:
    """Let SIGINT and SIGTERM add their number to the list returned instead of ending the process.

    A second one ends it at once, as without this.
    """
    caught: list[int] = []

    def note(number: int, _frame: object) -> None:
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    return caught
