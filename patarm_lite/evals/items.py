"""What the benchmarks share: items, answers to them, and how official scores get their intervals. Numpy only.

A benchmark is a record of functions, one file each. Its score is computed in two steps, and both are pure:

    units   answers -> what is drawn as one in the bootstrap, with its values (mostly one item each)
    table   the mean of each value in each subset -> every row of the official table

Intervals draw units within their subset, so that a draw has as many items of each subset as the benchmark has, and make
the whole table anew from each draw: 95 % percentiles.

Rules say what a tie earns. `official` is what the benchmark's own code does with a judge that scores one response at a
time; the three others are the same everywhere: a tie is wrong (`lose`), half (`half`) or right (`win`), and whatever
needs a response that could not be read earns nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patarm_lite.errors import UserError
from patarm_lite.pairs.chats import kind, turns_of_prompt
from patarm_lite.records import Turn

OFFICIAL, LOSE, HALF, WIN = "official", "lose", "half", "win"
RULES = {
    OFFICIAL: "the benchmark's own rule",
    LOSE: "a tie is wrong",
    HALF: "a tie earns half",
    WIN: "a tie is right",
}
DRAWS = 2000
CHANCE_DRAWS = 40
INTERVAL = (2.5, 97.5)
"""Percentiles of the bootstrap draws."""
NAMED = 3
"""Missing subsets that a table names; the others are counted."""
FOREIGN = "not the official items"
TIED, UNREADABLE = "tied", "unreadable"
"""Values that every unit has: the share of its comparisons that tie, and of its responses that have no score."""

Floats = NDArray[np.float64]
Means = Mapping[str, Mapping[str, float]]
"""Subset -> value -> mean over its units."""


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a file, and where it stands. Its readers raise UserError with that place."""

    file: str
    number: int
    row: Mapping[str, Any]

    def wrong(self, what: str) -> UserError:
        """What is wrong with this record.

        >>> print(Record("data/a.jsonl", 3, {}).wrong("field 'id' is missing"))
        data/a.jsonl line 3: field 'id' is missing
        """
        lines = self.file.removesuffix(".gz").endswith((".jsonl", ".ndjson"))
        return UserError(f"{self.file} {'line' if lines else 'record'} {self.number}: {what}")

    def need(self, fields: Sequence[str], what: str) -> None:
        """Raise UserError naming every field that is missing."""
        missing = [name for name in fields if name not in self.row]
        if missing:
            some = "field" if len(missing) == 1 else "fields"
            raise self.wrong(
                f"{some} {', '.join(map(repr, missing))} missing; {what} has {', '.join(fields)}; "
                f"found {', '.join(sorted(map(str, self.row)))[:120] or 'no fields'}"
            )

    def text(self, name: str) -> str:
        value = self.row.get(name)
        if not isinstance(value, str):
            raise self.wrong(f"{name!r} is {kind(value)}, not text")
        return value

    def name(self, *names: str) -> str:
        """The first of these fields that is there, text or a whole number, as text."""
        self.need(names[:1] if not any(name in self.row for name in names) else (), "a record")
        found = next(name for name in names if name in self.row)
        value = self.row[found]
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise self.wrong(f"{found!r} is {kind(value)}, not text or a whole number")
        return str(value)

    def id_in(self, subset: str) -> str:
        """Its `id` within a subset: ours have the subset before a slash."""
        return self.name("id").removeprefix(f"{subset}/")

    def texts(self, name: str) -> tuple[str, ...]:
        """A text or a list of texts."""
        value = self.row.get(name)
        found = value if isinstance(value, list) else [value]
        wrong = [one for one in found if not isinstance(one, str)]
        if wrong or not found:
            what = f"holds {kind(wrong[0])}, and its responses are texts" if wrong else "is an empty list"
            raise self.wrong(f"{name!r} {what}")
        return tuple(found)

    def turns(self, name: str) -> tuple[Turn, ...]:
        """A prompt: a text is one user turn as it stands, messages are turns."""
        value = self.row.get(name)
        found = (Turn("user", value),) if isinstance(value, str) else turns_of_prompt(value)
        if isinstance(found, str):
            raise self.wrong(f"{name!r}: {found}")
        return found

    def numbers(self, name: str, unreadable: float | None = None) -> tuple[float | None, ...]:
        """A number or a list of numbers; null, and the number that stands for it, is a score that can't be read."""
        value = self.row.get(name)
        found: list[float | None] = []
        for one in value if isinstance(value, list) else [value]:
            if one is None or (unreadable is not None and one == unreadable):
                found.append(None)
            elif isinstance(one, bool) or not isinstance(one, int | float) or not math.isfinite(one):
                raise self.wrong(f"{name!r} holds {str(one)[:30]!r}, not a number or null")
            else:
                found.append(float(one))
        return tuple(found)


@dataclass(frozen=True, slots=True)
class BenchItem:
    """One item of a benchmark.

    Attributes:
        id: as the benchmark names it, made unique; a string.
        subset: what its table counts by; intervals are drawn within it.
        label: the right decision, where the order of the responses does not say it.
        correct: so many of the responses, from the first, are right.
        group: items of one group are drawn and sampled together; "" is a group of its own.
        task: whose primary rubric the judge reads.
    """

    id: str
    subset: str
    label: str = ""
    correct: int = 1
    group: str = ""
    prompt: tuple[Turn, ...] = ()
    responses: tuple[str, ...] = ()
    task: str = "chat"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a judge says of an item: a score for each response (None could not be read), or decisions instead."""

    item: BenchItem
    scores: tuple[float | None, ...] = ()
    decisions: tuple[str | None, ...] | None = None


@dataclass(frozen=True, slots=True)
class Unit:
    """What is drawn as one, with its values; one that is not there is not in the mean."""

    subset: str
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A benchmark: where it comes from, how it is read, how it is scored.

    Attributes:
        name: as it is typed. `title`: as it is printed.
        hub: data sets on the hub, all of whose rows together are the benchmark (`pairs.files.read_rows` reads them).
        elsewhere: where else its files are, in words.
        commit: of those data sets, that is read where no other is asked for; `main` where none is known to us.
        names: beginnings of names of its files or folders (letters and digits, lower case).
        fields: that every record must have.
        full: what it is called in full -> number of items in each subset.
        keyed: a record -> its item without texts, for verdict files that bring their own labels.
        read: a record -> its item.
        answer: a verdict record, its item, and the number that stands for an unreadable score -> the answer.
        units, table: see above; `table` also gets the number of units in each subset.
        headline: the row of the table that stands for the whole.
        chance: row -> what a judge gets that draws scores at random and never ties, where that is a plain number.
        chance_drawn: rows for which it depends on the items; `chance_of` draws it.
        rule: what the official rule does with ties and unreadable scores, in words.
    """

    name: str
    title: str
    hub: tuple[str, ...]
    elsewhere: str
    names: tuple[str, ...]
    fields: tuple[str, ...]
    full: Mapping[str, Mapping[str, int]]
    keyed: Callable[[Record], BenchItem]
    read: Callable[[Record], BenchItem]
    answer: Callable[[Record, BenchItem, float | None], Answer]
    units: Callable[[Sequence[Answer], str], list[Unit]]
    table: Callable[[Means, Mapping[str, int]], dict[str, float]]
    headline: str
    chance: Mapping[str, float] = field(default_factory=dict)
    chance_drawn: tuple[str, ...] = ()
    rule: str = ""
    commit: str = "main"


def earned(right: float | None, wrong: float | None, rule: str) -> float:
    """What one comparison earns under a rule other than the official one.

    >>> [earned(5, 5, rule) for rule in (LOSE, HALF, WIN)], earned(7, 5, LOSE), earned(7, None, WIN)
    ([0.0, 0.5, 1.0], 1.0, 0.0)
    """
    if right is None or wrong is None:
        return 0.0
    if right != wrong:
        return float(right > wrong)
    return {LOSE: 0.0, HALF: 0.5, WIN: 1.0}[rule]


def pair_unit(answer: Answer, rule: str, official: float) -> Unit:
    """A pair whose first response is the right one, as a unit with the value `right`.

    Args:
        official: what a tie or an unreadable side earns by the official rule.
    """
    first, second = answer.scores
    tied = first is not None and first == second
    if rule == OFFICIAL:
        right = official if tied or first is None or second is None else float(first > second)
    else:
        right = earned(first, second, rule)
    return Unit(answer.item.subset, {"right": right, TIED: float(tied), UNREADABLE: blank(answer.scores)})


def blank(scores: Sequence[float | None]) -> float:
    """Share of scores that could not be read."""
    return sum(score is None for score in scores) / len(scores)


def scores_of(record: Record, item: BenchItem, unreadable: float | None, count: int) -> Answer:
    """An answer from a verdict record with `scores` in the order of the responses, or with the official names
    `score_chosen` and `score_rejected` (also `scores_...`)."""
    name = next((name for name in ("score", "scores") if f"{name}_chosen" in record.row), None)
    fields = ("scores",) if name is None else (f"{name}_chosen", f"{name}_rejected")
    record.need(fields, "a verdict")
    found = tuple(score for field in fields for score in record.numbers(field, unreadable))
    if len(found) != count:
        raise record.wrong(f"{len(found)} scores, and item {item.id!r} has {count} responses")
    return Answer(item, found)


def means_of(units: Sequence[Unit]) -> tuple[dict[str, dict[str, float]], dict[str, int]]:
    """Means of each value in each subset, and the number of units of each subset."""
    counts = Counter(unit.subset for unit in units)
    means: dict[str, dict[str, float]] = {}
    for subset in counts:
        sums: dict[str, list[float]] = {}
        for unit in units:
            if unit.subset == subset:
                for name, value in unit.values.items():
                    sums.setdefault(name, []).append(value)
        means[subset] = {name: sum(values) / len(values) for name, values in sums.items()}
    return means, dict(counts)


def score(benchmark: Benchmark, answers: Sequence[Answer], rule: str = OFFICIAL) -> dict[str, float]:
    """The benchmark's table: row -> figure, a share of 1. Rows whose items are not there are left out.

    Raises:
        UserError: there are no answers.
    """
    if not answers:
        raise UserError(f"there is nothing to score; {benchmark.title} needs at least one answer")
    return benchmark.table(*means_of(benchmark.units(answers, rule)))


def draws(benchmark: Benchmark, answers: Sequence[Answer], rule: str = OFFICIAL, seed: int = 0) -> dict[str, Floats]:
    """The table of each of DRAWS bootstrap draws: row -> [DRAWS]. Equal seeds draw the same items of the same answers,
    so that the difference of two judges can be taken draw by draw."""
    units = benchmark.units(answers, rule)
    rng = np.random.default_rng(seed)
    _, counts = means_of(units)
    drawn: dict[str, tuple[list[str], Floats]] = {}
    for subset in sorted(counts):
        rows = [unit.values for unit in units if unit.subset == subset]
        names = sorted({name for row in rows for name in row})
        values = np.array([[row.get(name, np.nan) for name in names] for row in rows])
        there = ~np.isnan(values)
        how_often = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=DRAWS).astype(float)
        with np.errstate(invalid="ignore", divide="ignore"):
            drawn[subset] = names, (how_often @ np.where(there, values, 0.0)) / (how_often @ there.astype(float))
    tables = []
    for number in range(DRAWS):
        means = {
            subset: dict(zip(names, found[number].tolist(), strict=True)) for subset, (names, found) in drawn.items()
        }
        tables.append(benchmark.table(means, counts))
    return {row: np.array([table.get(row, np.nan) for table in tables]) for row in tables[0]}


def chance_of(benchmark: Benchmark, answers: Sequence[Answer]) -> dict[str, float]:
    """Row -> what random scores that never tie get on these items; rows without such a figure are left out.

    Where `Benchmark.chance` does not know it, it is the mean of the tables of 40 draws, always the same ones.
    """
    if not benchmark.chance_drawn:
        return dict(benchmark.chance)
    rng = np.random.default_rng(0)
    sums: Counter[str] = Counter()
    for _ in range(CHANCE_DRAWS // 4):
        orders = [rng.permutation(len(answer.scores or answer.item.responses) or 2) for answer in answers]
        for turn in range(4):  # each of four responses, or of two, is the best one equally often
            ranks = [tuple(((order + turn) % len(order)).tolist()) for order in orders]
            sums.update(score(benchmark, [Answer(one.item, at) for one, at in zip(answers, ranks, strict=True)]))
    drawn = {row: sums[row] / CHANCE_DRAWS for row in benchmark.chance_drawn if row in sums}
    return {**drawn, **benchmark.chance}


def interval(drawn: Floats) -> tuple[float, float]:
    """Its 95 % percentiles."""
    low, high = np.nanpercentile(drawn, INTERVAL)
    return float(low), float(high)


def shares(benchmark: Benchmark, answers: Sequence[Answer]) -> tuple[float, float]:
    """Share of comparisons that tie and of responses without a score, over all units."""
    units = benchmark.units(answers, OFFICIAL)
    tied, unreadable = (sum(unit.values[name] for unit in units) / len(units) for name in (TIED, UNREADABLE))
    return tied, unreadable


def weighted(means: Means, counts: Mapping[str, int], value: str, subsets: Sequence[str]) -> float | None:
    """The mean of a value over the items of several subsets; None where none of them is there.

    >>> weighted({"a": {"right": 1.0}, "b": {"right": 0.0}}, {"a": 3, "b": 1}, "right", ["a", "b", "c"])
    0.75
    """
    there = [subset for subset in subsets if subset in means]
    if not there:
        return None
    return sum(means[subset][value] * counts[subset] for subset in there) / sum(counts[subset] for subset in there)


def part_of(benchmark: Benchmark, items: Sequence[BenchItem]) -> str | None:
    """None where the items are a whole benchmark, else what they are, in words: every table names them so.

    >>> from patarm_lite.evals.llmbar import LLMBAR
    >>> part_of(LLMBAR, [BenchItem("a", "Natural"), BenchItem("b", "Manual")])
    'in part: 2 of 419 items, no Neighbor, GPTInst, GPTOut'
    """
    found = Counter(item.subset for item in items)
    if any(dict(found) == dict(counts) for counts in benchmark.full.values()):
        return None
    whole = max(benchmark.full.values(), key=lambda counts: sum(min(found[name], counts[name]) for name in counts))
    missing = [name for name in whole if not found[name]]
    others = f" and {len(missing) - NAMED} more" if len(missing) > NAMED + 1 else ""
    more = f", no {', '.join(missing[:NAMED] if others else missing)}{others}" if missing else ""
    total = sum(whole.values())
    if len(items) > total or any(found[name] > whole.get(name, 0) for name in found):
        return f"{FOREIGN}: {len(items)}, where there are {total}{more}"
    return f"in part: {len(items)} of {total} items{more}"


def name_of(known: Mapping[str, Any]) -> str:
    """A benchmark's name as every table prints it: with what is there in part."""
    return known["title"] if known["part"] is None else f"{known['title']} ({known['part']})"


def label_of(known: Mapping[str, Any]) -> str:
    """A benchmark's name as plots print it.

    >>> label_of({"title": "LLMBar", "part": None}), label_of({"title": "LLMBar", "part": "in part: 9 of 419 pairs"})
    ('LLMBar', 'LLMBar (in part)')
    """
    return known["title"] if known["part"] is None else f"{known['title']} ({known['part'].partition(':')[0]})"


def folded(name: str) -> str:
    """Letters and digits of a name, lower case."""
    return "".join(char for char in name.lower() if char.isalnum())


def named_in(file: str, names: Sequence[str]) -> str | None:
    """The one of some names that is in a file's name, else in its folder's, else in that of the folder above.

    >>> named_in("Adversarial/Manual/dataset.json", ["Natural", "Manual"])
    'Manual'
    """
    for part in reversed(Path(file).parts[-3:]):
        found = [name for name in names if folded(name) in folded(part)]
        if found:
            return found[0] if len(found) == 1 else None
    return None
