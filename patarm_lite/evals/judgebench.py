"""JudgeBench: pairs of one model's answers, one right and one wrong, on hard questions of four kinds.

Official: `utils/metrics.py` (compute_final_metrics), `run_judge.py`, `utils/judges.py`. A judge that sees both
responses is asked in both orders. The second decision is turned back, each decision counts +1 if right and -1 if wrong,
a tie or none counts 0, and a pair is right where the sum is above 0. All pairs stay in the denominator.

A judge that scores each response alone has no order, so it plays a single game: its one decision must be the label. The
official code for scalar reward models makes "A>B" of a higher first score and "B>A" of everything else, *so a tie
becomes "B>A"* and is right wherever the label says so. We report that figure as the official one, and the one in which
a tie earns half beside it: with ratings from 1 to 10 they can differ by a lot, and the second says more. A pair with an
unreadable side has no decision and is not right.
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
    scores_of,
    weighted,
)
from patarm_lite.pairs.tasks import task_of_value

A, B, TIE = "A>B", "B>A", "A=B"
FLIPPED: Mapping[str | None, str | None] = {A: B, B: A, TIE: TIE, None: None}
GROUPS = ("mmlu-pro", "livebench-reasoning", "livebench-math", "livecodebench")
SPLITS = {
    "GPT-4o split": dict(zip(GROUPS, (154, 98, 56, 42), strict=True)),
    "Claude split": dict(zip(GROUPS, (154, 51, 34, 31), strict=True)),
}
OVERALL = "Overall"


def pair_is_right(label: str, decisions: Sequence[str | None]) -> bool:
    """Whether a pair is right: one decision (single game), or two, the second with the responses swapped.

    >>> pair_is_right("A>B", ["A>B", "B>A"]), pair_is_right("A>B", ["A>B", "A>B"]), pair_is_right("A>B", ["A>B", None])
    (True, False, True)
    >>> pair_is_right("A>B", ["A=B"])
    False
    """
    if len(decisions) == 1:
        return decisions[0] == label
    first, second = decisions
    counter = 0
    for decision in (first, FLIPPED[second]):
        counter += (decision == label) - (decision is not None and decision == FLIPPED[label])
    return counter > 0


def decision_of(first: float | None, second: float | None) -> str | None:
    """The official decision from two scores: a tie is "B>A".

    >>> decision_of(7, 5), decision_of(5, 5), decision_of(None, 5)
    ('A>B', 'B>A', None)
    """
    if first is None or second is None:
        return None
    return A if first > second else B


def _keyed(record: Record) -> BenchItem:
    source, label = record.name("source"), record.name("label")
    groups = [group for group in GROUPS if source.startswith(group)]
    if not groups:
        raise record.wrong(f"source {source[:40]!r} begins with none of {', '.join(GROUPS)}")
    if label not in (A, B):
        raise record.wrong(f"label {label[:20]!r} is neither {A} nor {B}")
    return BenchItem(record.name("pair_id", "id"), groups[0], label, task=task_of_value(source) or "chat")


def _read(record: Record) -> BenchItem:
    responses = record.text("response_A"), record.text("response_B")
    return replace(_keyed(record), prompt=record.turns("question"), responses=responses)


def _answer(record: Record, item: BenchItem, unreadable: float | None) -> Answer:
    """Scores, `decisions`, or the official output's `judgments`."""
    found: Any = record.row.get("decisions")
    if found is None and isinstance(record.row.get("judgments"), list):
        found = [one.get("decision") if isinstance(one, dict) else None for one in record.row["judgments"]]
    if found is None:
        if "scores" not in record.row:
            raise record.wrong("none of the fields 'scores', 'decisions' and 'judgments' is there")
        return scores_of(record, item, unreadable, 2)
    if not isinstance(found, list) or len(found) not in (1, 2):
        raise record.wrong("decisions are a list of one (single game) or two (both orders)")
    wrong = [one for one in found if one not in FLIPPED]
    if wrong:
        raise record.wrong(f"decision {str(wrong[0])[:20]!r} is none of {A}, {B}, {TIE}, null")
    return Answer(item, decisions=tuple(found))


def _units(answers: Sequence[Answer], rule: str) -> list[Unit]:
    return [_unit(answer, rule) for answer in answers]


def _unit(answer: Answer, rule: str) -> Unit:
    label = answer.item.label
    if answer.decisions is not None:
        tied = sum(one == TIE for one in answer.decisions) / len(answer.decisions)
        none = sum(one is None for one in answer.decisions) / len(answer.decisions)
        right = float(pair_is_right(label, answer.decisions))
        return Unit(answer.item.subset, {"right": right, TIED: tied, UNREADABLE: none})
    first, second = answer.scores
    if rule == OFFICIAL:
        right = float(decision_of(first, second) == label)
    else:
        right = earned(first, second, rule) if label == A else earned(second, first, rule)
    tied = float(first is not None and first == second)
    return Unit(answer.item.subset, {"right": right, TIED: tied, UNREADABLE: blank(answer.scores)})


def _table(means: Means, counts: Mapping[str, int]) -> dict[str, float]:
    overall = weighted(means, counts, "right", GROUPS)
    assert overall is not None
    return {OVERALL: overall, **{group: means[group]["right"] for group in GROUPS if group in means}}


JUDGEBENCH = Benchmark(
    name="judgebench",
    title="JudgeBench",
    hub=("ScalerLab/JudgeBench:gpt",),
    elsewhere="a file of the `data` folder of its repository (at commit e2c52c28)",
    names=("judgebench",),
    fields=("pair_id", "source", "question", "response_A", "response_B", "label"),
    full=SPLITS,
    keyed=_keyed,
    read=_read,
    answer=_answer,
    units=_units,
    table=_table,
    headline=OVERALL,
    chance=dict.fromkeys((OVERALL, *GROUPS), 0.5),
    rule="single game: a tie becomes B>A, as the official code has it; an unreadable side is not right",
)
