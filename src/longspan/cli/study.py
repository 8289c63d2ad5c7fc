"""`longspan study`: run a paper's claims again, with controls."""

from __future__ import annotations

from pathlib import Path

from ..errors import ConfigError
from ._console import console, step
from ._inputs import check_device, run_folder

__all__ = ["study"]


def study(
    name: str = "stick-breaking-length",
    *,
    train: Path | None = None,
    heldout: Path | None = None,
    data: Path | None = None,
    out: Path | None = None,
    budget: float = 8.0,
    small: bool = False,
    stop_after: float | None = None,
    prepare_only: bool = False,
    report: bool = False,
    device: str | None = None,
    model: str = "smollm2-135m",
    tokens: tuple[int, ...] = (4096, 8192),
    prompts: int = 50,
    only: str | None = None,
    steps: int | None = None,
) -> int:
    """Train, evaluate and report. The same command again goes on where it stopped.

    Parameters
    ----------
    name
        stick-breaking-length: does perplexity keep improving beyond the training length?
        hyper-pretrained: what does HyperAttention cost in a pretrained model?
        hyper-finetune: does training under it close its gap to exact attention?
        infini-passkey: does Infini-attention, trained at 5,000 tokens, find a key in a million?
        infini-books: does a compressive memory help to model books of 32,768 tokens?
    train
        Texts to train on: a folder of .txt files or an archive.
    heldout
        Texts that every reported number is of.
    data
        Folder with both as tokens, made by --prepare-only, instead of --train and --heldout.
    out
        Folder of the run: rows.jsonl, report.html, report.md, models/.
    budget
        Minutes that training and measuring may take; the number of steps follows.
    small
        Models and lengths for a processor.
    stop_after
        Seconds after which to stop; what is finished is kept.
    prepare_only
        Only make the tokens, packed for travelling, in --out.
    report
        Only write the report of the rows that --out has.
    device
        cpu or cuda.
    only
        Phases, with commas, e.g. small:rope,recall; all others are left out. For
        hyper-pretrained: of perplexity, tasks, layers and mass. For infini-passkey: e.g.
        linear:0,local:0. For infini-books: of infini, window, cache, infini-delta and full.
    steps
        infini-books: optimizer steps of each training. Default: 3,000, or 60 with --small.
    model
        hyper-pretrained: a name of `longspan models`, a folder, or owner/name.
    tokens
        hyper-pretrained: lengths.
    prompts
        hyper-pretrained: per task and length.
    """
    from ..studies.registry import get_study

    info = get_study(name)
    folder = run_folder(out, "study", info.name)
    if report:
        return _write_report(info.package, folder)
    if info.name == "hyper-pretrained":
        from ..models import load
        from ..studies.hyper_pretrained.run import PARTS, run_pretrained
        from ..studies.hyper_pretrained.texts import heldout_texts

        with step(f"model {model}"):
            loaded = load(model, device=check_device(device))
        finished = run_pretrained(
            loaded,
            heldout_texts(heldout),
            folder,
            tokens=tokens,
            prompts=prompts,
            parts=only.split(",") if only else PARTS,
            stop_after=stop_after,
            listener=_say,
        ).is_finished
        if not finished:
            console.print(f"To go on: the same command with --out {folder}", soft_wrap=True)
        return _write_report(info.package, folder)
    if data is None and (train is None or heldout is None):
        raise ConfigError(
            "--train: came without both texts. Allowed: --train and --heldout (folders of .txt "
            "files or archives), or --data with the folder of --prepare-only. Give both texts."
        )
    from ..studies.stick_breaking_length.data import open_data, prepare_data
    from ..studies.stick_breaking_length.run import run_study
    from ..studies.stick_breaking_length.sizes import FULL, SMALL

    if data is None:
        assert train is not None
        assert heldout is not None
        data = folder if prepare_only else folder / "data"
        with step("tokens of both texts"):
            prepare_data(train, heldout, data, pack=prepare_only)
    if prepare_only:
        console.print(f"Prepared: {data.absolute()}", soft_wrap=True)
        return 0
    if info.name == "hyper-finetune":
        from ..studies.hyper_finetune import run as finetune

        finished = finetune.run_finetune(
            open_data(data),
            folder,
            sizes=finetune.SMALL if small else finetune.FULL,
            device=check_device(device),
            stop_after=stop_after,
            listener=_say,
        ).is_finished
        if not finished:
            console.print(f"To go on: the same command with --out {folder}", soft_wrap=True)
        return _write_report(info.package, folder)
    if info.name == "infini-books":
        from ..studies.infini_books import run as books

        finished = books.run_books(
            open_data(data),
            folder,
            sizes=books.SMALL if small else books.FULL,
            steps=steps,
            device=check_device(device),
            stop_after=stop_after,
            only=only.split(",") if only else None,
            listener=_say,
        ).is_finished
        if not finished:
            console.print(f"To go on: the same command with --out {folder}", soft_wrap=True)
        return _write_report(info.package, folder)
    if info.name == "infini-passkey":
        from ..studies.infini_passkey import run as passkey

        asked = passkey.run_passkey(
            open_data(data),
            data / "tokenizer.json",
            folder,
            sizes=passkey.SMALL if small else passkey.FULL,
            budget_minutes=None if small else budget,
            device=check_device(device),
            stop_after=stop_after,
            only=only.split(",") if only else None,
            listener=_say,
        )
        for failure in asked.failures:
            console.print(f"failed: {failure}", markup=False, soft_wrap=True)
        code = _write_report(info.package, folder)
        if not asked.is_finished:
            console.print(f"To go on: the same command with --out {folder}", soft_wrap=True)
            return 1 if asked.failures else code
        return code
    outcome = run_study(
        open_data(data),
        folder,
        sizes=SMALL if small else FULL,
        budget_minutes=budget,
        device=check_device(device),
        stop_after=stop_after,
        only=only.split(",") if only else None,
        listener=_say,
    )
    for failure in outcome.failures:
        console.print(f"failed: {failure}", markup=False, soft_wrap=True)
    code = _write_report(info.package, folder)
    if not outcome.is_finished:
        console.print(f"To go on: the same command with --out {folder}", soft_wrap=True)
        return 1 if outcome.failures else code
    return code


def _say(text: str) -> None:
    console.print(f"  {text}", markup=False, soft_wrap=True)


def _write_report(package: str, folder: Path) -> int:
    from importlib import import_module

    from ..eval.rows import read_rows
    from ..studies.report import render_markdown, write_html

    page_module = import_module(f"longspan.studies.{package}.page")
    built = page_module.build_report(read_rows(folder / "rows.jsonl"))
    page = write_html(built, folder / "report.html")
    (folder / "report.md").write_text(render_markdown(built), encoding="utf-8")
    console.print(built.headline, markup=False)
    for verdict in built.verdicts:
        console.print(f"{verdict.claim}: {verdict.outcome}. {verdict.numbers}", markup=False)
    console.print(f"Report: {page}", soft_wrap=True)
    return 0
