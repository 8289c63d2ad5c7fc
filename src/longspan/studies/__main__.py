"""`python -m longspan.studies`: a study on a machine that has torch but not the command line."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

__all__ = ["main"]

NOT_FINISHED = 3  # exit code: the call's time is up, the same command goes on


def main(arguments: list[str] | None = None) -> int:
    """Run a study and print a line for each thing that is done. 0: finished, 3: not yet."""
    parser = argparse.ArgumentParser(prog="python -m longspan.studies", description=__doc__)
    studies = parser.add_subparsers(dest="study", required=True)
    length = studies.add_parser("stick-breaking-length")
    length.add_argument("--data", type=Path, required=True, help="folder of `prepare_data`")
    length.add_argument("--budget", type=float, default=8.0, help="minutes on this device")
    length.add_argument("--small", action="store_true", help="sizes for a processor")
    length.add_argument("--no-compile", action="store_true")
    length.add_argument("--only", help="phases, with commas, e.g. small:rope,recall")
    hyper = studies.add_parser("hyper-pretrained")
    hyper.add_argument("--model", default="smollm2-135m", help="name or folder")
    hyper.add_argument("--heldout", type=Path, help="texts; default: the book in the package")
    hyper.add_argument("--tokens", default="4096,8192", help="lengths, with commas")
    hyper.add_argument("--documents", type=int, default=4)
    hyper.add_argument("--prompts", type=int, default=50, help="per task and length")
    hyper.add_argument("--batch", type=int, default=4)
    hyper.add_argument("--parts", help="of perplexity,tasks,layers,mass; default: all")
    hyper.add_argument("--setting", action="append", help="a name or settings; repeats")
    hyper.add_argument("--impl", default="auto")
    hyper.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    finetune = studies.add_parser("hyper-finetune")
    finetune.add_argument("--data", type=Path, required=True, help="folder of `prepare_data`")
    finetune.add_argument("--small", action="store_true", help="sizes for a processor")
    passkey = studies.add_parser("infini-passkey")
    passkey.add_argument("--data", type=Path, required=True, help="folder of `prepare_data`")
    passkey.add_argument("--budget", type=float, help="minutes; default: --steps")
    passkey.add_argument("--steps", type=int, help="of each training, instead of a budget")
    passkey.add_argument("--small", action="store_true", help="sizes for a processor")
    passkey.add_argument("--only", help="phases, with commas, e.g. linear:0,local:0 or :0")
    books = studies.add_parser("infini-books")
    books.add_argument("--data", type=Path, required=True, help="folder of `prepare_data`")
    books.add_argument("--steps", type=int, help="of each training")
    books.add_argument("--small", action="store_true", help="sizes for a processor")
    books.add_argument("--only", help="models, with commas, e.g. infini,window")
    for one in (length, hyper, finetune, passkey, books):
        one.add_argument("--out", type=Path, required=True, help="folder of the run")
        one.add_argument("--stop-after", type=float, help="seconds until this call returns")
        one.add_argument("--device")
    chosen = parser.parse_args(arguments)

    from ..errors import LongspanError

    begin = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - begin:7.1f} s  {text}", flush=True)

    try:
        runs = {
            "stick-breaking-length": _length,
            "hyper-pretrained": _hyper,
            "hyper-finetune": _finetune,
            "infini-passkey": _passkey,
            "infini-books": _books,
        }
        outcome, failures = runs[chosen.study](chosen, say)
    except LongspanError as error:
        print(f"longspan: {error}", file=sys.stderr)
        return 2
    for failure in failures:
        print(f"longspan: {failure}", file=sys.stderr)
    say("finished" if outcome else "not finished: run the same command again")
    return 0 if outcome else NOT_FINISHED


def _length(chosen: argparse.Namespace, say: Callable[[str], None]) -> tuple[bool, list[str]]:
    from .stick_breaking_length.data import open_data
    from .stick_breaking_length.run import run_study
    from .stick_breaking_length.sizes import FULL, SMALL

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
    return outcome.is_finished, outcome.failures


def _hyper(chosen: argparse.Namespace, say: Callable[[str], None]) -> tuple[bool, list[str]]:
    import torch

    from ..models import load
    from .hyper_pretrained.run import PARTS, run_pretrained
    from .hyper_pretrained.texts import heldout_texts

    device = chosen.device or ("cuda" if torch.cuda.is_available() else "cpu")
    outcome = run_pretrained(
        load(chosen.model, device=device, dtype=getattr(torch, chosen.dtype)),
        heldout_texts(chosen.heldout),
        chosen.out,
        tokens=[int(n) for n in chosen.tokens.split(",")],
        documents=chosen.documents,
        prompts=chosen.prompts,
        batch=chosen.batch,
        settings=chosen.setting,
        parts=chosen.parts.split(",") if chosen.parts else PARTS,
        impl=chosen.impl,
        stop_after=chosen.stop_after,
        listener=say,
    )
    return outcome.is_finished, []


def _finetune(chosen: argparse.Namespace, say: Callable[[str], None]) -> tuple[bool, list[str]]:
    from .hyper_finetune.run import FULL, SMALL, run_finetune
    from .stick_breaking_length.data import open_data

    outcome = run_finetune(
        open_data(chosen.data),
        chosen.out,
        sizes=SMALL if chosen.small else FULL,
        device=chosen.device,
        stop_after=chosen.stop_after,
        listener=say,
    )
    return outcome.is_finished, []


def _books(chosen: argparse.Namespace, say: Callable[[str], None]) -> tuple[bool, list[str]]:
    from .infini_books.run import FULL, SMALL, run_books
    from .stick_breaking_length.data import open_data

    outcome = run_books(
        open_data(chosen.data),
        chosen.out,
        sizes=SMALL if chosen.small else FULL,
        steps=chosen.steps,
        device=chosen.device,
        stop_after=chosen.stop_after,
        only=chosen.only.split(",") if chosen.only else None,
        listener=say,
    )
    return outcome.is_finished, []


def _passkey(chosen: argparse.Namespace, say: Callable[[str], None]) -> tuple[bool, list[str]]:
    from .infini_passkey.run import run_passkey
    from .infini_passkey.sizes import FULL, SMALL
    from .stick_breaking_length.data import open_data

    outcome = run_passkey(
        open_data(chosen.data),
        chosen.data / "tokenizer.json",
        chosen.out,
        sizes=SMALL if chosen.small else FULL,
        budget_minutes=chosen.budget,
        steps=chosen.steps,
        device=chosen.device,
        stop_after=chosen.stop_after,
        only=chosen.only.split(",") if chosen.only else None,
        listener=say,
    )
    return outcome.is_finished, outcome.failures


if __name__ == "__main__":
    sys.exit(main())
