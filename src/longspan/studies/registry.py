"""The studies by name; standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError, nearest_name

__all__ = ["STUDIES", "StudyInfo", "get_study"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyInfo:
    """A study: its package below longspan.studies, and what it asks."""

    name: str
    package: str
    question: str


_TABLE = (
    StudyInfo(
        name="stick-breaking-length",
        package="stick_breaking_length",
        question="Does perplexity keep improving beyond the training length?",
    ),
    StudyInfo(
        name="hyper-pretrained",
        package="hyper_pretrained",
        question="What does HyperAttention cost in a pretrained model?",
    ),
    StudyInfo(
        name="hyper-finetune",
        package="hyper_finetune",
        question="Does training under HyperAttention close its gap to exact attention?",
    ),
    StudyInfo(
        name="infini-passkey",
        package="infini_passkey",
        question="Does Infini-attention find a passkey far beyond its training length?",
    ),
    StudyInfo(
        name="infini-books",
        package="infini_books",
        question="Does a compressive memory help to model books?",
    ),
)

STUDIES: dict[str, StudyInfo] = {info.name: info for info in _TABLE}


def get_study(name: str) -> StudyInfo:
    """The study called `name`; an unknown name raises ConfigError with the nearest one."""
    try:
        return STUDIES[name]
    except KeyError:
        raise ConfigError(f"study: {name!r} is no study. {nearest_name(name, STUDIES)}") from None
