"""`python -m longspan.studies`: a study on a machine that has torch but not the command line."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

__all__ = ["main"]

NOT_FINISHED = 3  # exit code: the call's time is up, the same command goes on


def main(arguments: list[str] | None = None) -> int:
    """Run a study and print a line for each thing that is done. 0: finished, 3: not yet."""
    parser = argparse.ArgumentParser(prog="python -m longspan.studies", description=__doc__)
    parser.add_argument("study", choices=["stick-breaking-length"])
    parser.add_argument("--data", type=Path, required=True, help="folder of `prepare_data`")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--budget", type=float, default=8.0, help="minutes on this device")
    parser.add_argument("--small", action="store_true", help="sizes for a processor")
    parser.add_argument("--stop-after", type=float, help="seconds until this call returns")
    parser.add_argument("--device")
    parser.add_argument("--only", help="phases, with commas, e.g. small:rope,recall")
    parser.add_argument("--no-compile", action="store_true")
    chosen = parser.parse_args(arguments)

    from ..errors import LongspanError
    from .stick_breaking_length.data import open_data
    from .stick_breaking_length.run import run_study
    from .stick_breaking_length.sizes import FULL, SMALL

    begin = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - begin:7.1f} s  {text}", flush=True)

    try:
        outcome = run_study(
            open_data(chosen.data),
            chosen.out,
            sizes=SMALL if chosen.small else FULL,
            budget_minutes=chosen.budget,
            device=chosen.device,
            stop_after=chosen.stop_after,
            compile=False if chosen.no_compile else None,
            listener=say,
            only=chosen.only.split(",") if chosen.only else None,
        )
    except LongspanError as error:
        print(f"longspan: {error}", file=sys.stderr)
        return 2
    for failure in outcome.failures:
        print(f"longspan: {failure}", file=sys.stderr)
    say("finished" if outcome.is_finished else "not finished: run the same command again")
    return 0 if outcome.is_finished else NOT_FINISHED


if __name__ == "__main__":
    sys.exit(main())
