"""The words of patarm-lite as frozen records: fields only, no behaviour."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

TASKS = ("chat", "math", "code", "safety")


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a chat. `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Pair:
    """One prompt with a chosen and a rejected response.

    `prompt` is a chat; a plain prompt is one user turn. `meta` keeps what the source said besides
    (for the arena: asked criteria and true qualities); nothing in training reads the truth in it.
    """

    prompt: tuple[Turn, ...]
    chosen: str
    rejected: str
    task: str = "chat"
    id: str = ""
    source: str = ""
    reference: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Criterion:
    """A named, described, weighted quality. `weight` is 1 to 5."""

    name: str
    description: str
    weight: int = 1


Rubric = tuple[Criterion, ...]


@dataclass(frozen=True, slots=True)
class CriterionScore:
    """What a judgement says of one criterion: a finding in words and a score from 1 to 10."""

    name: str
    finding: str
    score: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is read from one judgement: a score, or no score and one problem.

    Either `score` is 1 to 10 and `problem` is None, or `score` is None and `problem` says why.
    `faults` are flaws that leave the score standing.
    """

    score: int | None
    problem: str | None = None
    rubric: Rubric = ()
    criterion_scores: tuple[CriterionScore, ...] = ()
    faults: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Vote:
    """One judgement of one response: its verdict, its text, and the expected score beside the sampled one.

    `expected` is None where the digit mass at the score position was below 0.5 or not measured; `tokens` counts the
    generated tokens.
    """

    verdict: Verdict
    text: str
    expected: float | None = None
    mass: float | None = None
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class JudgedPair:
    """A pair with the k votes of each side."""

    pair: Pair
    chosen: tuple[Vote, ...]
    rejected: tuple[Vote, ...]
