"""Token files: a corpus as 16-bit ids that are mapped into memory, with its documents' bounds.

NAME.npy (or NAME.npy.xz, for travelling) holds the ids of all documents, each after a token 0;
NAME.json says where each begins and which tokenizer and texts made it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import lzma
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

    from ..eval.data import Text

__all__ = ["TokenFile", "write_tokens"]

_FORMAT = "longspan-tokens-1"
_BATCH = 16  # documents encoded at a time, in parallel


@dataclass(frozen=True, kw_only=True)
class TokenFile:
    """A corpus of tokens.

    ids: (total,), uint16, mapped from the file.
    starts: index of the first token (the 0) of each document.
    names: of the documents.
    num_bytes: of the texts in UTF-8, without the marks between them; one per document.
    vocab_size: of the tokenizer. tokenizer_sha256: of its file.
    sha256: of all texts, in order.
    """

    ids: np.ndarray[Any, Any]
    starts: tuple[int, ...]
    names: tuple[str, ...]
    num_bytes: tuple[int, ...]
    vocab_size: int
    tokenizer_sha256: str
    sha256: str

    def document(self, index: int) -> np.ndarray[Any, Any]:
        """Ids of one document, its mark in front."""
        ends = (*self.starts[1:], len(self.ids))
        return self.ids[self.starts[index] : ends[index]]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> TokenFile:
        """Map a token file. An .npy.xz beside which no .npy lies is unpacked first.

        Args:
            path: NAME.npy, whether or not only NAME.npy.xz is there.

        Raises:
            ConfigError: missing, of another format, or of another length than its JSON says.
        """
        import numpy as np

        target = Path(path)
        packed = target.with_name(target.name + ".xz")
        try:
            if not target.exists() and packed.exists():
                _unpack(packed, target)
            head = json.loads(target.with_suffix(".json").read_text())
            if head.pop("format", None) != _FORMAT:
                raise ValueError("another format")
            ids = np.load(target, mmap_mode="r", allow_pickle=False)
            if len(ids) != head.pop("total"):
                raise ValueError("another number of tokens than its JSON says")
            lists: dict[str, Any] = {
                name: tuple(head.pop(name)) for name in ("starts", "names", "num_bytes")
            }
            return cls(ids=ids, **lists, **head)
        except (OSError, ValueError, KeyError, TypeError, lzma.LZMAError, EOFError) as error:
            raise ConfigError(
                f"tokens: {target} cannot be read ({error}). Allowed: NAME.npy or NAME.npy.xz "
                "with NAME.json beside it, as longspan.train.write_tokens makes them. Make them "
                "again, or copy both files whole."
            ) from error

    def pack(self, path: str | os.PathLike[str]) -> Path:
        """Write NAME.npy.xz and NAME.json for travelling; about 1.6 bytes per token."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        _write(target, self)
        packed = target.with_name(target.name + ".xz")
        with open(target, "rb") as source, lzma.open(packed, "wb", preset=6) as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
        target.unlink()
        return packed


def write_tokens(
    texts: Iterable[Text],
    tokenizer: Any,
    path: str | os.PathLike[str],
    *,
    progress: Callable[[str], None] | None = None,
) -> TokenFile:
    """Encode documents and write NAME.npy and NAME.json; both appear whole or not at all.

    Args:
        texts: of `longspan.eval.data.iter_texts`.
        tokenizer: of `load_tokenizer`.
        path: NAME.npy.
        progress: called with the name of each document that is done.

    Raises:
        ConfigError: a vocabulary that does not fit into 16 bits.
    """
    import numpy as np

    if tokenizer.get_vocab_size() > 65_536:
        raise ConfigError(
            f"write_tokens: the tokenizer has {tokenizer.get_vocab_size()} entries; ids are kept "
            "in 16 bits, so at most 65,536 are allowed. Use a smaller vocabulary."
        )
    parts, starts, names, sizes, total = [], [], [], [], 0
    digest = hashlib.sha256()
    for group in _groups(texts):
        encoded = tokenizer.encode_batch([text.text for text in group], add_special_tokens=False)
        for text, encoding in zip(group, encoded, strict=True):
            ids = np.array([0, *encoding.ids], dtype=np.uint16)
            starts.append(total)
            names.append(text.name)
            sizes.append(len(text.text.encode()))
            parts.append(ids)
            total += len(ids)
            digest.update(text.sha256.encode())
            if progress:
                progress(text.name)
    made = TokenFile(
        ids=np.concatenate(parts),
        starts=tuple(starts),
        names=tuple(names),
        num_bytes=tuple(sizes),
        vocab_size=tokenizer.get_vocab_size(),
        tokenizer_sha256=hashlib.sha256(tokenizer.to_str().encode()).hexdigest(),
        sha256=digest.hexdigest(),
    )
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    _write(target, made)
    return TokenFile.open(target)


def _groups(texts: Iterable[Text]) -> Iterable[list[Text]]:
    group: list[Text] = []
    for text in texts:
        group.append(text)
        if len(group) == _BATCH:
            yield group
            group = []
    if group:
        yield group


def _write(target: Path, tokens: TokenFile) -> None:
    import numpy as np

    head = {f.name: getattr(tokens, f.name) for f in dataclasses.fields(tokens) if f.name != "ids"}
    head |= {"format": _FORMAT, "total": len(tokens.ids)}
    aside = target.with_name(f".{target.name}.{os.getpid()}.part")
    with open(aside, "wb") as handle:
        np.save(handle, np.asarray(tokens.ids), allow_pickle=False)
    note = target.with_suffix(".json")
    note_aside = note.with_name(f".{note.name}.{os.getpid()}.part")
    note_aside.write_text(json.dumps(head))
    os.replace(note_aside, note)
    os.replace(aside, target)


def _unpack(packed: Path, target: Path) -> None:
    aside = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with lzma.open(packed, "rb") as source, open(aside, "wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)
