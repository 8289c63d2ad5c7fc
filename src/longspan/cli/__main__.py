"""`longspan`: the application, put together from one file per command."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ..errors import LongspanError, MissingExtraError

__all__ = ["main"]

_COMMANDS = (
    *("compare", "ppl", "passkey", "profile", "plan", "train", "study", "generate"),
    *("bench", "info", "selfcheck", "models"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 2 for bad input, 130 after Ctrl-C."""
    try:
        import cyclopts
        import rich  # noqa: F401 - needed by every command, so say now that it is missing
    except ImportError as error:
        missing = MissingExtraError.for_module("the command line", str(error.name), "cli")
        print(f"longspan: {missing}", file=sys.stderr)
        return 2
    from importlib import import_module

    from .. import __version__
    from ._console import show_error

    app = cyclopts.App(
        name="longspan",
        help="Affordable long-context attention: compare mechanisms on real models, and measure.",
        version=__version__,
        suppress_keyboard_interrupt=False,
        default_parameter=cyclopts.Parameter(negative=()),
        result_action="return_value",
    )
    for name in _COMMANDS:
        app.command(getattr(import_module(f".{name}", __package__), name), name=name)
    tokens = sys.argv[1:] if arguments is None else list(arguments)
    try:
        result = app(tokens, exit_on_error=False, print_error=False)
    except cyclopts.CycloptsError as error:
        show_error(f"{error} Run the command with --help to see what it takes.")
        return 2
    except LongspanError as error:
        show_error(str(error))
        return 2
    except KeyboardInterrupt:
        show_error("Interrupted.")
        return 130
    return result if isinstance(result, int) else 0


if __name__ == "__main__":
    sys.exit(main())
