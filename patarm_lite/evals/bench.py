"""Run a judge on benchmarks: every response of every item is judged on its own, k times; official scores come of that.

What is needed, how long it takes, and how a run that was killed goes on: see `drawn.py`. Benchmarks that ask for the
same response share its votes, and `--k 8` after `--k 4` at the same temperature draws four. A response that does not
fit the judge's context has no score; it is counted apart, and in the official rules it stands where an unreadable one
stands.

Judges are run one after the other, the one before first: two models need not fit in memory together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from patarm_lite.evals.bench_data import Loaded
from patarm_lite.evals.drawn import Drawn, Part, draw
from patarm_lite.evals.items import Answer
from patarm_lite.evals.named_judge import NamedJudge
from patarm_lite.judge.scored import summarised
from patarm_lite.records import Vote
from patarm_lite.store import Store

if TYPE_CHECKING:
    from patarm_lite.judge.judge import Judge

Spot = tuple[str, str, int]
"""A benchmark's name, the id of an item, and the place of a response in it."""


@dataclass(frozen=True, slots=True)
class Judged:
    """k votes on one response: their mean score and mean expected score, and how many could not be read. `fits` is
    False where the response was too long to be judged at all."""

    score: float | None
    expected: float | None
    votes: int
    unreadable: int
    fits: bool = True


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one judge says of all items: place of a response -> what was judged, and what judged it."""

    place: str
    fingerprint: str
    trained: bool | None
    backend: str
    tokens: str
    decoding: str
    temperature: float
    votes: int
    drawn: int
    seconds: float
    found: Mapping[Spot, Judged]
    kept: Drawn
    where: Mapping[Spot, tuple[int, int]]

    def answers(self, loaded: Loaded, by: str) -> list[Answer]:
        """Its answers to a benchmark. `by`: `score` (the mean of the ratings read) or `expected`."""
        name = loaded.benchmark.name
        return [
            Answer(item, tuple(getattr(self.found[name, item.id, place], by) for place in range(len(item.responses))))
            for item in loaded.items
        ]

    def of(self, loaded: Loaded) -> list[Judged]:
        """Everything judged for a benchmark."""
        items = {item.id for item in loaded.items}
        return [one for (name, item, _), one in self.found.items() if name == loaded.benchmark.name and item in items]

    def judgements(self, spot: Spot) -> tuple[Vote, ...] | None:
        """The votes on one response, while the store is open; None where it was too long to be judged."""
        return self.kept.votes(*self.where[spot])


def judge_benchmarks(named: NamedJudge, benchmarks: Sequence[Loaded], store: Store, k: int) -> Outcome:
    """Judge every response of some benchmarks, k votes each.

    Raises:
        UserError: a judge that can't be loaded or can't go on, a store or disk that can't be written. What was drawn is
            kept.
    """
    with named.load() as judge:
        parts = [_part(judge, loaded, k) for loaded in benchmarks]
        what = ",".join(f"{loaded.benchmark.name}:{loaded.sha256[:12]}:{len(loaded.items)}" for loaded in benchmarks)
        drawn = draw(judge, parts, store, name="bench", source=what, place=named.place, check=named.check)
        where = {
            (loaded.benchmark.name, item, place): (number, order)
            for number, loaded in enumerate(benchmarks)
            for order, (item, place) in enumerate(_places(loaded))
        }
        backend, total = judge.backend, drawn.total
        judged = {spot: _judged(judge, drawn.votes(*at), parts[at[0]].items[at[1]].task) for spot, at in where.items()}
        return Outcome(
            place=named.place,
            fingerprint=backend.fingerprint,
            trained=getattr(backend, "trained", None),
            backend=backend.name,
            tokens=backend.tokens,
            decoding=judge.plan.decoding,
            temperature=judge.plan.temperature,
            votes=drawn.needed,
            drawn=total.drawn,
            seconds=total.seconds,
            found=judged,
            kept=drawn,
            where=where,
        )


def _places(loaded: Loaded) -> list[tuple[str, int]]:
    return [(item.id, place) for item in loaded.items for place in range(len(item.responses))]


def _part(judge: Judge, loaded: Loaded, k: int) -> Part:
    items = [judge.item(item.prompt, response, task=item.task) for item in loaded.items for response in item.responses]
    ids = [f"item {item!r}" for item, _ in _places(loaded)]
    return Part(loaded.benchmark.title, items, ids, k, judge.plan, f"{len(loaded.items)} items", loaded.source)


def _judged(judge: Judge, votes: tuple[Vote, ...] | None, task: str) -> Judged:
    if votes is None:
        return Judged(None, None, 0, 0, fits=False)
    backend = judge.backend
    scored = summarised(
        votes, task=task, decoding=judge.plan.decoding, tokens=backend.tokens, fingerprint=backend.fingerprint
    )
    unreadable = sum(vote.verdict.score is None for vote in votes)
    return Judged(scored.score, scored.expected, len(votes), unreadable)
