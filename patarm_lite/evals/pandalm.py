"""PandaLM's test set: 999 pairs of small models' answers, each labelled by three people: first, second, or a tie.

Official: `data/compute_metrics.py`. The label is the majority of the three, a tie is a class of its own, and what can't
be read counts as a tie. Accuracy over all pairs, and precision, recall and F1 averaged over the three classes.

A judge that scores one response at a time says "tie" where the two scores are equal. Scores with many values (means of
votes, expected scores) hardly ever tie, and the 105 or so pairs that people call ties are then lost; the other rules
here are over the pairs that people do not call a tie.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

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
)
from patarm_lite.pairs.chats import kind

PEOPLE = ("annotator1", "annotator2", "annotator3")
TIE, CLASSES = "0", ("0", "1", "2")
ACCURACY, AVERAGED = "Accuracy", ("precision", "recall", "F1")
SUBSET = "test"


def majority(votes: Sequence[int]) -> str:
    """The commonest of the votes; the first one given, where several are equally common.

    >>> majority([1, 0, 0]), majority([2, 1, 0])
    ('0', '2')
    """
    return str(Counter(votes).most_common(1)[0][0])


def class_of(first: float | None, second: float | None) -> str:
    """The class that two scores stand for; what can't be read is a tie, as the official code has it.

    >>> class_of(7, 5), class_of(5, 5), class_of(None, 5)
    ('1', '0', '0')
    """
    if first is None or second is None or first == second:
        return TIE
    return "1" if first > second else "2"


def _label(record: Record) -> str:
    if "label" in record.row:
        found = record.name("label")
        if found not in CLASSES:
            raise record.wrong(f"label {found[:20]!r} is none of {', '.join(CLASSES)}")
        return found
    record.need(PEOPLE, "a record of PandaLM")
    votes = [record.row[name] for name in PEOPLE]
    wrong = [vote for vote in votes if type(vote) is not int or vote not in (0, 1, 2)]
    if wrong:
        raise record.wrong(f"an annotator says {str(wrong[0])[:20]!r}, not 0 (tie), 1 or 2")
    return majority(votes)


def _keyed(record: Record) -> BenchItem:
    return BenchItem(record.name("idx", "id"), SUBSET, _label(record))


def _response(record: Record, name: str) -> str:
    """A response as text. Some stand as true or false in the file (a model's answer "True")."""
    value = record.row[name]
    if isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise record.wrong(f"{name!r} is {kind(value)}, not text")
    return value


def _read(record: Record) -> BenchItem:
    prompt = record.turns("instruction")
    more = record.text("input")
    if more.strip():
        prompt = (*prompt[:-1], replace(prompt[-1], content=f"{prompt[-1].content}\n\n{more}"))
    responses = _response(record, "response1"), _response(record, "response2")
    return replace(_keyed(record), prompt=prompt, responses=responses)


def _answer(record: Record, item: BenchItem, unreadable: float | None) -> Answer:
    """Scores, or one of `decision`, `gpt_result`, `pandalm_result`: 1, 2, and anything else a tie (0, Tie, garbage)."""
    given = next((name for name in ("decision", "gpt_result", "pandalm_result") if name in record.row), None)
    if given is None:
        return scores_of(record, item, unreadable, 2)
    said = str(record.row[given]).strip()
    if said.lower() not in ("0", "1", "2", "tie", "garbage", "none"):
        raise record.wrong(f"{given!r} is {said[:20]!r}, not 0, 1, 2, Tie or garbage")
    decision = said if said in ("1", "2") else TIE if said.lower() in ("0", "tie") else None
    return Answer(item, decisions=(decision,))


def _units(answers: Sequence[Answer], rule: str) -> list[Unit]:
    return [_unit(answer, rule) for answer in answers]


def _unit(answer: Answer, rule: str) -> Unit:
    label = answer.item.label
    if answer.decisions is not None:
        (decision,) = answer.decisions
        found = decision or TIE
        values = {TIED: float(decision == TIE), UNREADABLE: float(decision is None)}
    else:
        first, second = answer.scores
        found = class_of(first, second)
        values = {TIED: float(first is not None and first == second), UNREADABLE: blank(answer.scores)}
        if rule != OFFICIAL:
            right = earned(*((first, second) if label == "1" else (second, first)), rule)
            return Unit(SUBSET, values | ({"right": right} if label != TIE else {}))
    return Unit(SUBSET, {**{a + b: float((a, b) == (label, found)) for a in CLASSES for b in CLASSES}, **values})


def _table(means: Means, counts: Mapping[str, int]) -> dict[str, float]:
    values = means[SUBSET]
    if TIE + TIE not in values:
        return {ACCURACY: values["right"]} if "right" in values else {}
    averaged = []
    for one in CLASSES:
        hits = values[one + one]
        precision = _ratio(hits, sum(values[other + one] for other in CLASSES))
        recall = _ratio(hits, sum(values[one + other] for other in CLASSES))
        averaged.append((precision, recall, _ratio(2 * precision * recall, precision + recall)))
    accuracy = sum(values[one + one] for one in CLASSES)
    macros = zip(AVERAGED, zip(*averaged, strict=True), strict=True)
    return {ACCURACY: accuracy, **{f"Macro {name}": sum(found) / 3 for name, found in macros}}


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


PANDALM = Benchmark(
    name="pandalm",
    title="PandaLM",
    hub=(),
    elsewhere="data/testset-v1.json of the repository WeOpenML/PandaLM",
    names=("pandalm", "testsetv1"),
    fields=("idx", "instruction", "input", "response1", "response2", *PEOPLE),
    full={"999 pairs": {SUBSET: 999}},
    keyed=_keyed,
    read=_read,
    answer=_answer,
    units=_units,
    table=_table,
    headline=ACCURACY,
    chance_drawn=(ACCURACY, *(f"Macro {name}" for name in AVERAGED)),
    rule="three classes, a tie is one of them, and so is what can't be read; the other rules leave out human ties",
)
