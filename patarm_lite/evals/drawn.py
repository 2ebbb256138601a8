"""Votes on responses, from the store or drawn and kept there: what `bench`, `audit` and `compare` judge with.

    parts = [Part("LLMBar", items, ids, k=1, plan=judge.plan), ...]
    drawn = draw(judge, parts, store, name="bench", source="llmbar.jsonl", place="judge.gguf")
    drawn.votes(0, 17)                      # those of the first part's eighteenth response

Before it starts, `draw` says how many verdicts each part needs, how many of them the store has, and how long the rest
will take: that is measured, on a warm-up of responses of all lengths whose votes count like all others. Every vote is
kept the moment it is there, so a run that is killed goes on with the same command; equal responses to equal prompts,
asked for in one way, share their votes, whichever part asks. A response that is too long for the judge has no votes:
it is counted, never guessed.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from patarm_lite.errors import UserError
from patarm_lite.judge.backend import Item, Plan
from patarm_lite.judge.fitting import CutWarning, fitted
from patarm_lite.progress import Progress, span
from patarm_lite.records import JudgedPair, Pair, Vote
from patarm_lite.store import Job, Store, item_key

if TYPE_CHECKING:
    from patarm_lite.judge.judge import Judge

BLOCK_VOTES = 512
"""Votes asked for at once: the last ones of a block are written with idle places beside them, so not too few."""
WARM_UP = 32
"""Votes of the warm-up: as many as are written at once by default, so that it is as fast as the rest."""


@dataclass(frozen=True, slots=True)
class Part:
    """Responses that are judged in one way, for one purpose.

    Attributes:
        name: what they are, as the plan prints it, e.g. `LLMBar`. `what`: more of it in words, e.g. `419 items`.
        items: the responses, as the judge is given them. `ids`: what each is called where it can't be judged.
        k: votes a response. plan: how they are drawn.
        source: where the responses are from, in words.
    """

    name: str
    items: Sequence[Item]
    ids: Sequence[str]
    k: int
    plan: Plan
    what: str = ""
    source: str = ""


@dataclass(frozen=True, slots=True)
class Rate:
    """Votes drawn in this run, and the seconds that took."""

    drawn: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Drawn:
    """All votes of some parts. They are read from the store when asked for: a whole benchmark's need not fit in memory.

    `keys` and `prompt_tokens` are [parts][responses]; a key of None is a response too long to be judged. `rates`: how
    fast votes of each way of drawing were drawn now. `needed`: votes in all, shared ones counted once.
    """

    parts: Sequence[Part]
    keys: list[list[bytes | None]]
    prompt_tokens: list[list[int]]
    store: Store
    needed: int
    rates: Mapping[Plan, Rate]

    def votes(self, part: int, place: int) -> tuple[Vote, ...] | None:
        """The k votes on a response; None where it is too long to be judged."""
        key, one = self.keys[part][place], self.parts[part]
        if key is None:
            return None
        found = self.store.votes(key, one.plan.expected)
        return tuple(found[index].vote for index in range(one.k))

    def of(self, part: int) -> list[tuple[Vote, ...] | None]:
        """The votes on every response of a part."""
        return [self.votes(part, place) for place in range(len(self.keys[part]))]

    @property
    def total(self) -> Rate:
        """All votes that were drawn now."""
        return Rate(sum(r.drawn for r in self.rates.values()), sum(r.seconds for r in self.rates.values()))


@dataclass(slots=True)
class _Needed:
    """What is needed: response -> its votes' key, and by key what is judged, how, and which votes are missing."""

    keys: list[list[bytes | None]] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    asked: dict[bytes, tuple[Item, Plan]] = field(default_factory=dict)
    votes: dict[bytes, int] = field(default_factory=dict)
    lengths: dict[bytes, int] = field(default_factory=dict)
    missing: dict[bytes, list[int]] = field(default_factory=dict)

    def to_draw(self) -> dict[Plan, dict[bytes, list[int]]]:
        """What is missing, by how it is drawn."""
        found: dict[Plan, dict[bytes, list[int]]] = {}
        for key, indices in self.missing.items():
            found.setdefault(self.asked[key][1], {})[key] = indices
        return found


def draw(
    judge: Judge,
    parts: Sequence[Part],
    store: Store,
    *,
    name: str,
    source: str,
    place: str,
    check: Callable[[], None] = lambda: None,
) -> Drawn:
    """Draw what the store does not have: say what is needed, warm up, say how long it takes, go on.

    Args:
        name: of what is done, for the progress line and the store. source: what it is done with, so that the same
            command again is known as the same.
        place: what the judge is called.
        check: called between blocks; raises UserError when the judge is no longer what it was.

    Raises:
        UserError: a prompt that can't be rendered, a judge that can't go on, a store or disk that can't be written.
            What was drawn is kept.
    """
    needed = _needed(judge, parts, store)
    ways = "; ".join(dict.fromkeys(_way(part) for part in parts))
    job = Job(name, source, "-", judge.backend.fingerprint, ways)
    _say_plan(place, judge, parts, needed, ways, store, job)
    rates = _Drawing(judge, store, needed, check, name).run()
    check()
    store.finish(job, "", "")
    return Drawn(parts, needed.keys, needed.tokens, store, sum(needed.votes.values()), rates)


def _needed(judge: Judge, parts: Sequence[Part], store: Store) -> _Needed:
    """What is needed, and what the store has of it."""
    backend = judge.backend
    found = _Needed()
    for part in parts:
        keys: list[bytes | None] = []
        tokens = []
        for label, item in zip(part.ids, part.items, strict=True):
            try:
                asked, used = _fitted(judge, item, part.plan)
            except UserError as error:
                raise UserError(f"{part.name}, {label}: {error}") from None
            tokens.append(used)
            if asked is None:
                keys.append(None)
                continue
            key = item_key(backend.fingerprint, backend.name, backend.tokens, backend.protocol, asked, part.plan)
            keys.append(key)
            found.asked.setdefault(key, (asked, part.plan))
            found.lengths[key] = used
            found.votes[key] = max(part.k, found.votes.get(key, 0))
        found.keys.append(keys)
        found.tokens.append(tokens)
    for key, k in found.votes.items():
        missing = sorted(set(range(k)) - set(store.votes(key, found.asked[key][1].expected)))
        if missing:
            found.missing[key] = missing
    return found


def _fitted(judge: Judge, item: Item, plan: Plan) -> tuple[Item | None, int]:
    """What the judge is given for a response, None where that is too long for it; and the tokens of its prompt."""
    used = judge.backend.prompt_tokens(item)
    room = judge.backend.context - plan.max_tokens
    if used <= room:
        return item, used
    if judge.long == "error":
        return None, used
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CutWarning)
            return fitted(judge.backend, item, plan, judge.long)[0], room
    except UserError:  # even without the response
        return None, used


def _way(part: Part) -> str:
    """How a part is drawn, in words: it tells jobs apart."""
    plan = part.plan
    seed = f", seed {plan.seed}" if plan.temperature else ""
    return (
        f"votes {part.k}, decoding {plan.decoding}, temperature {plan.temperature:g}{seed}, "
        f"at most {plan.max_tokens} tokens"
    )


def _say_plan(
    place: str, judge: Judge, parts: Sequence[Part], needed: _Needed, ways: str, store: Store, job: Job
) -> None:
    """The settings, then what is needed; the time is said after the warm-up."""
    backend = judge.backend
    trained = "" if getattr(backend, "trained", None) is not False else " untrained,"
    say(
        f"judge {place} (fingerprint {backend.fingerprint[:12]}, {backend.name},{trained} tokens {backend.tokens}), "
        f"{ways}"
    )
    for part, keys in zip(parts, needed.keys, strict=True):
        long = sum(key is None for key in keys)
        counts = [*([part.what] if part.what else []), f"{len(keys)} responses"]
        counts += [f"{long} too long to be judged"] if long else []
        say(f"  {part.name}: {', '.join(counts)}{f'; from {part.source}' if part.source else ''}")
    total, missing = sum(needed.votes.values()), sum(map(len, needed.missing.values()))
    shared = sum(key is not None for keys in needed.keys for key in keys) - len(needed.asked)
    again = f", {shared} responses are asked for more than once" if shared else ""
    where = f"kept, judgements in clear, in {store.path}" if store.path is not None else "kept nowhere"
    say(f"  {total} verdicts needed, {total - missing} in the store, {missing} to be drawn{again}")
    say(f"  votes are {where}")
    if store.begin(job) is not None and store.finished(job) is None:
        say("  going on with a run that was stopped")
    for other in store.other_judges(job)[:1]:
        say(f"  the same was begun with another judge (fingerprint {other[:12]}); its votes don't count for this one")


class _Drawing:
    """Drawing what is missing: a warm-up of each way of drawing, then the rest in blocks."""

    def __init__(self, judge: Judge, store: Store, needed: _Needed, check: Callable[[], None], name: str) -> None:
        self.judge, self.store, self.needed, self.check, self.name = judge, store, needed, check, name
        self.total = sum(map(len, needed.missing.values()))
        self.drawn = 0
        self.progress: Progress | None = None

    def run(self) -> dict[Plan, Rate]:
        """Draw everything; how fast."""
        groups = self.needed.to_draw()
        warm = {plan: self._warm_up(missing) for plan, missing in groups.items()}
        rates = {plan: self._draw(plan, block) for plan, block in warm.items()}
        left = {plan: sum(map(len, groups[plan].values())) - rate.drawn for plan, rate in rates.items()}
        if any(left.values()):
            rest = sum(left[plan] * rate.seconds / rate.drawn for plan, rate in rates.items())
            speed = self.drawn / sum(rate.seconds for rate in rates.values())
            count = sum(left.values())
            say(f"  warm-up: {speed:.2f} verdicts a second; the other {count} take about {span(rest)}")
        seconds = sum(rate.seconds for rate in rates.values())
        self.progress = Progress(self.name, self.total, done=self.drawn, even=False, before=seconds)
        for plan, missing in groups.items():
            others = {key: indices for key, indices in missing.items() if key not in warm[plan]}
            for block in _blocks(others):
                more = self._draw(plan, block)
                rates[plan] = Rate(rates[plan].drawn + more.drawn, rates[plan].seconds + more.seconds)
        return rates

    def _warm_up(self, missing: Mapping[bytes, list[int]]) -> dict[bytes, list[int]]:
        """Responses of all lengths, evenly, with about WARM_UP votes."""
        order = sorted(missing, key=lambda key: (self.needed.lengths[key], key))
        each = max(1, round(sum(map(len, missing.values())) / len(order)))
        count = min(len(order), max(1, WARM_UP // each))
        places = [(2 * number + 1) * len(order) // (2 * count) for number in range(count)]
        return {order[place]: missing[order[place]] for place in places}

    def _draw(self, plan: Plan, block: Mapping[bytes, Sequence[int]]) -> Rate:
        self.check()
        backend, keys, before = self.judge.backend, list(block), self.drawn
        asked = [(self.needed.asked[key][0], list(block[key])) for key in keys]
        began = time.monotonic()
        try:
            for place, index, vote in backend.votes(asked, plan):
                seconds = time.monotonic() - began
                self.store.add(keys[place], index, backend.fingerprint, vote, seconds, plan.expected)
                self.drawn += 1
                if self.progress is not None:
                    self.progress.at(self.drawn, "verdicts")
        except UserError as error:
            if not self.drawn:
                raise
            raise UserError(f"{error}; {self._kept()}") from error
        except KeyboardInterrupt:
            say(f"stopped; {self._kept()}")
            raise
        return Rate(self.drawn - before, time.monotonic() - began)

    def _kept(self) -> str:
        if self.store.path is None:
            return "nothing was kept, since there is no store"
        return f"{self.drawn} new votes are kept in {self.store.path}, and the same command goes on from there"


def _blocks(missing: Mapping[bytes, list[int]]) -> Iterator[dict[bytes, list[int]]]:
    """What is missing in blocks of BLOCK_VOTES votes or a few more."""
    block: dict[bytes, list[int]] = {}
    for key, indices in missing.items():
        block[key] = indices
        if sum(map(len, block.values())) >= BLOCK_VOTES:
            yield block
            block = {}
    if block:
        yield block


def pair_part(judge: Judge, pairs: Sequence[Pair], k: int, name: str = "pairs", source: str = "") -> Part:
    """Both responses of each pair, chosen first, k votes each."""
    items = [
        judge.item(pair.prompt, response, pair.reference, task=pair.task)
        for pair in pairs
        for response in (pair.chosen, pair.rejected)
    ]
    ids = [f"pair {pair.id!r}" for pair in pairs for _ in range(2)]
    return Part(name, items, ids, k, judge.plan, f"{len(pairs)} pairs, {k} votes a response", source)


def judged_pairs(pairs: Sequence[Pair], votes: Sequence[tuple[Vote, ...] | None]) -> list[JudgedPair | None]:
    """Pairs with the votes of both sides; None where a side was too long to be judged."""
    return [
        None if chosen is None or rejected is None else JudgedPair(pair, chosen, rejected)
        for pair, chosen, rejected in zip(pairs, votes[::2], votes[1::2], strict=True)
    ]


def say(words: str) -> None:
    """One line to the person at the terminal."""
    print(words, file=sys.stderr, flush=True)
