"""The one exception for mistakes a user can mend, and how a script reports it."""

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
