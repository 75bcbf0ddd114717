"""The one exception for mistakes a user can mend, and how a script ends."""

import signal
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake in the input. Its one line says which file or key, what is wrong and the fix."""


def run(main: Callable[[], None]) -> None:
    """Call `main`; report a `UserError` as one line on stderr with exit code 2, Ctrl-C with 130."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


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
