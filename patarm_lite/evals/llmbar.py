"""LLMBar: 419 pairs in which one response follows the instruction and the other only looks as if it did.

Official: `LLMEvaluator/evaluate.py`. Every pair is judged in both orders and the winner mapped back. Accuracy is the
mean over both orders, agreement the share of pairs with the same winner in both (two unreadable ones agree), and "both"
the share that is right twice. Reported for each folder; Adversarial is the mean of its four.

A judge that rates one response at a time has no order, but the official code's comparison has: an equal or unreadable
rating gives one right and one wrong winner, so accuracy 0.5 and agreement 0. Ratings with a point are unreadable there;
a mean of several votes is a number here.

The benchmark has no single official figure. "All items" is the mean over its items, ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from patarm_lite.evals.items import (
    OFFICIAL,
    TIED,
    UNREADABLE,
    Answer,
    BenchItem,
    Benchmark,
    Means,
    Record,
    Unit,
    blank,
    earned,
    named_in,
    scores_of,
    weighted,
)

COUNTS = {"Natural": 100, "Neighbor": 134, "GPTInst": 92, "GPTOut": 47, "Manual": 46}
ADVERSARIAL = tuple(name for name in COUNTS if name != "Natural")
ALL = "All items"
VALUES = {"accuracy": "", "agreement": " agreement", "both": " right in both orders"}
"""Value -> how its rows are called."""
ORDERS = ("swap = False", "swap = True")


def winners(first: float | None, second: float | None) -> tuple[str, str]:
    """The winner in the given order and, mapped back, in the swapped one.

    >>> winners(8, 5), winners(7, 7), winners(None, 7)
    (('1', '1'), ('2', '1'), ('1', '2'))
    """
    if first is None or second is None:
        return "1", "2"
    return ("1" if first > second else "2"), ("2" if second > first else "1")


def values_of(label: str, found: Sequence[str | None]) -> dict[str, float]:
    """Accuracy, agreement and right in both orders, of one pair."""
    right = [winner == label for winner in found]
    return {"accuracy": sum(right) / 2, "agreement": float(found[0] == found[1]), "both": float(all(right))}


def _subset(record: Record) -> str:
    said = record.name("subset") if "subset" in record.row else record.file
    found = named_in(said, tuple(COUNTS))
    if found is None:
        raise record.wrong(
            f"the subset is not clear from {said[-60:]!r}; name the file or its folder after one of {', '.join(COUNTS)}"
        )
    return found


def _keyed(record: Record) -> BenchItem:
    subset, label = _subset(record), record.name("label")
    if label not in ("1", "2"):
        raise record.wrong(f"label {label[:20]!r} is neither 1 nor 2")
    name = record.id_in(subset) if "id" in record.row else str(record.number)
    return BenchItem(f"{subset}/{name}", subset, label)


def _read(record: Record) -> BenchItem:
    responses = record.text("output_1"), record.text("output_2")
    return replace(_keyed(record), prompt=record.turns("input"), responses=responses)


def _answer(record: Record, item: BenchItem, unreadable: float | None) -> Answer:
    """Scores, `decisions` (winners in both orders, mapped back), or the official output's `swap = ...` objects."""
    found: Any = record.row.get("decisions")
    if found is None and ORDERS[0] in record.row:
        record.need(ORDERS, "an official output")
        sides = [record.row[order] for order in ORDERS]
        found = [side.get("winner") if isinstance(side, dict) else None for side in sides]
    if found is None:
        return scores_of(record, item, unreadable, 2)
    if not isinstance(found, list) or len(found) != 2 or any(one not in ("1", "2", 1, 2, None) for one in found):
        raise record.wrong("decisions are two winners (without and with the swap, mapped back): 1, 2 or null")
    return Answer(item, decisions=tuple(None if one is None else str(one) for one in found))


def _units(answers: Sequence[Answer], rule: str) -> list[Unit]:
    return [_unit(answer, rule) for answer in answers]


def _unit(answer: Answer, rule: str) -> Unit:
    item = answer.item
    if answer.decisions is not None:
        none = sum(one is None for one in answer.decisions) / 2
        return Unit(item.subset, {**values_of(item.label, answer.decisions), TIED: 0.0, UNREADABLE: none})
    first, second = answer.scores
    values = values_of(item.label, winners(first, second))
    if rule != OFFICIAL:
        values = {"accuracy": earned(*((first, second) if item.label == "1" else (second, first)), rule)}
    tied = float(first is not None and first == second)
    return Unit(item.subset, {**values, TIED: tied, UNREADABLE: blank(answer.scores)})


def _table(means: Means, counts: Mapping[str, int]) -> dict[str, float]:
    there = [name for name in COUNTS if name in means]
    found: dict[str, float] = {}
    for value, words in VALUES.items():
        if any(value not in means[name] for name in there):
            continue
        overall = weighted(means, counts, value, there)
        assert overall is not None
        found[ALL + words] = overall
        adversarial = [means[name][value] for name in ADVERSARIAL if name in means]
        if adversarial:
            found["Adversarial" + words] = sum(adversarial) / len(adversarial)
        found |= {name + words: means[name][value] for name in there}
    return found


LLMBAR = Benchmark(
    name="llmbar",
    title="LLMBar",
    hub=tuple(
        f"princeton-nlp/LLMBar@LLMBar:{name}"
        for name in ("Natural", *(f"Adversarial_{subset}" for subset in ("Neighbor", "GPTInst", "GPTOut", "Manual")))
    ),
    elsewhere="the `Dataset/LLMBar` folder of its repository (at commit 900616bf)",
    names=("llmbar",),
    fields=("input", "output_1", "output_2", "label"),
    full={"419 pairs": COUNTS},
    keyed=_keyed,
    read=_read,
    answer=_answer,
    units=_units,
    table=_table,
    headline=ALL,
    chance=dict.fromkeys((ALL, "Adversarial", *COUNTS), 0.5),
    rule="equal or unreadable ratings give one right and one wrong winner: accuracy 0.5, agreement 0",
)
