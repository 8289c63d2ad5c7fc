"""Take a finished study into the repository: its rows, its pages, its small models with cards.

    python tools/ship_study.py TOKENIZER_JSON RUN_FOLDER [RUN_FOLDER ...]

A RUN_FOLDER is the --out of `longspan study stick-breaking-length` or `infini-books`; several, of
one plan, each with other phases (--only), are put together. Refuses models above 8 MB. Small models
that the study has not made yet are left out, and said so.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from longspan.eval.rows import read_rows
from longspan.studies.infini_books.card import model_card as books_card
from longspan.studies.infini_books.run import KEPT
from longspan.studies.stick_breaking_length.card import model_card
from longspan.studies.stick_breaking_length.run import SIBLINGS
from longspan.train import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / "docs" / "studies" / "rows"
ROWS = HOME / "stick-breaking-length.jsonl"
SHIPPED = ROOT / "src" / "longspan" / "models" / "shipped"
MOST_BYTES = 8_000_000


def ship(
    runs: Sequence[Path], tokenizer: Path, *, rows_path: Path = ROWS, shipped: Path = SHIPPED
) -> None:
    """Copy and check everything; nothing is copied if one check fails."""
    rows = {row["key"]: row for run in runs for row in read_rows(run / "rows.jsonl")}
    plan = next(row for row in rows.values() if row["kind"] == "plan")
    size = load_tokenizer(tokenizer).get_vocab_size()
    if plan["vocab_size"] != size:
        raise SystemExit(f"the tokenizer has {size} entries, the study {plan['vocab_size']}")
    made = {row["variant"] for row in rows.values() if row["kind"] == "sibling"}
    folders, cards = {}, {}
    for variant in SIBLINGS:
        if variant not in made:
            print(f"no small model of {variant} yet")
            continue
        cards[variant] = model_card(list(rows.values()), variant)
        folders[variant] = next(
            folder for run in runs if (folder := run / "models" / variant).is_dir()
        )
        weights = folders[variant] / "model.safetensors"
        if weights.stat().st_size > MOST_BYTES:
            raise SystemExit(f"{weights} has {weights.stat().st_size} bytes, above {MOST_BYTES}")
    rows_path.parent.mkdir(parents=True, exist_ok=True)
    rows_path.write_text("".join(json.dumps(row) + "\n" for row in rows.values()), encoding="utf-8")
    if not cards:
        return
    shipped.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(tokenizer, shipped / "tokenizer.json")
    for variant, card in cards.items():
        target = shipped / variant
        target.mkdir(exist_ok=True)
        for name in ("model.safetensors", "config.json"):
            shutil.copyfile(folders[variant] / name, target / name)
        (target / "README.md").write_text(card, encoding="utf-8")
        print(target.relative_to(shipped.parent))


def ship_books(
    runs: Sequence[Path],
    tokenizer: Path,
    *,
    rows_path: Path = HOME / "infini-books.jsonl",
    shipped: Path = SHIPPED,
) -> None:
    """The same for `infini-books`, whose one model is called KEPT."""
    rows = {row["key"]: row for run in runs for row in read_rows(run / "rows.jsonl")}
    card = books_card(list(rows.values()))
    folder = next(found for run in runs if (found := run / "models" / KEPT).is_dir())
    size = (folder / "model.safetensors").stat().st_size
    if size > MOST_BYTES:
        raise SystemExit(f"{folder} has {size} bytes, above {MOST_BYTES}")
    vocabulary = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    if vocabulary != load_tokenizer(tokenizer).get_vocab_size():
        raise SystemExit(f"the model has {vocabulary} entries, not those of {tokenizer}")
    rows_path.write_text("".join(json.dumps(row) + "\n" for row in rows.values()), encoding="utf-8")
    target = shipped / KEPT
    target.mkdir(parents=True, exist_ok=True)
    for name in ("model.safetensors", "config.json"):
        shutil.copyfile(folder / name, target / name)
    if not (shipped / "tokenizer.json").exists():
        shutil.copyfile(tokenizer, shipped / "tokenizer.json")
    (target / "README.md").write_text(card, encoding="utf-8")
    print(target.relative_to(shipped.parent))


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    folders = [Path(name) for name in sys.argv[2:]]
    study = read_rows(folders[0] / "rows.jsonl")[0]["study"]
    (ship_books if study == "infini-books" else ship)(folders, Path(sys.argv[1]))
    subprocess.run([sys.executable, str(ROOT / "tools" / "studies.py")], check=True)
