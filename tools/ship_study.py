"""Take a finished study into the repository: its rows, its pages, its small models with cards.

    python tools/ship_study.py RUN_FOLDER TOKENIZER_JSON

RUN_FOLDER is the --out of `longspan study stick-breaking-length`. Refuses models above 8 MB.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from longspan.eval.rows import read_rows
from longspan.studies.stick_breaking_length.card import model_card
from longspan.studies.stick_breaking_length.run import SIBLINGS
from longspan.train import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
ROWS = ROOT / "docs" / "studies" / "rows" / "stick-breaking-length.jsonl"
SHIPPED = ROOT / "src" / "longspan" / "models" / "shipped"
MOST_BYTES = 8_000_000


def ship(run: Path, tokenizer: Path, *, rows_path: Path = ROWS, shipped: Path = SHIPPED) -> None:
    """Copy and check everything; nothing is copied if one check fails."""
    rows = read_rows(run / "rows.jsonl")
    cards = {variant: model_card(rows, variant) for variant in SIBLINGS}
    size = load_tokenizer(tokenizer).get_vocab_size()
    plan = next(row for row in rows if row["kind"] == "plan")
    if plan["vocab_size"] != size:
        raise SystemExit(f"the tokenizer has {size} entries, the study {plan['vocab_size']}")
    for variant in SIBLINGS:
        weights = run / "models" / variant / "model.safetensors"
        if weights.stat().st_size > MOST_BYTES:
            raise SystemExit(f"{weights} has {weights.stat().st_size} bytes, above {MOST_BYTES}")
    rows_path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(run / "rows.jsonl", rows_path)
    shipped.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(tokenizer, shipped / "tokenizer.json")
    for variant, card in cards.items():
        target = shipped / variant
        target.mkdir(exist_ok=True)
        for name in ("model.safetensors", "config.json"):
            shutil.copyfile(run / "models" / variant / name, target / name)
        (target / "README.md").write_text(card, encoding="utf-8")
        print(target.relative_to(shipped.parent))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    ship(Path(sys.argv[1]), Path(sys.argv[2]))
    subprocess.run([sys.executable, str(ROOT / "tools" / "studies.py")], check=True)
