"""Rubrics: text <-> Rubric, and the primary rubric of each task."""

from __future__ import annotations

import functools
import importlib.resources
import re

from patarm_lite.errors import UserError, nearest
from patarm_lite.records import TASKS, Criterion, Rubric

WEIGHTS = range(1, 6)
NAME_PATTERN = r"(?P<name>[^\s():<>‹](?:[^\n\r():<>‹]{0,58}[^\s():<>‹])?)"
"""A criterion's name: 1 to 60 characters of one line, without brackets or colon, no white space at its ends."""
NUMBER_PATTERN = r"-?(?:0|[1-9][0-9]{0,8})"
"""A plain integer in ASCII digits, no sign but a minus, no leading zero. Whether it is in range is asked later."""

_LINE = re.compile(NAME_PATTERN + r" \((?P<weight>" + NUMBER_PATTERN + r")\): (?P<meaning>\S[^\n\r]*)")


def rubric_text(rubric: Rubric) -> str:
    """A rubric in the protocol's line form.

    >>> print(rubric_text((Criterion("tone", "is friendly", 2), Criterion("facts", "is right", 5))))
    tone (2): is friendly
    facts (5): is right
    """
    return "\n".join(f"{c.name} ({c.weight}): {c.description}" for c in rubric)


def read_line(line: str) -> Criterion | None:
    """The criterion of one line `NAME (WEIGHT): MEANING`, or None where the line is not in that form.

    The weight is any plain integer; whether it is in `WEIGHTS` is for the caller to say.

    >>> read_line("tone (2): is friendly")
    Criterion(name='tone', description='is friendly', weight=2)
    >>> read_line("tone: is friendly")
    """
    match = _LINE.fullmatch(line)
    return None if match is None else Criterion(match["name"], match["meaning"].rstrip(), int(match["weight"]))


def parse_rubric(text: str, where: str = "rubric") -> Rubric:
    """A rubric from lines `NAME (WEIGHT): MEANING`; blank lines and white space around a line don't matter.

    Args:
        text: the lines; LF or CRLF, with or without a byte order mark.
        where: what the text is called in an error.

    Raises:
        UserError: naming the first line that is not in that form, or names a criterion again.

    >>> parse_rubric("tone (2): is friendly")
    (Criterion(name='tone', description='is friendly', weight=2),)
    """
    rubric: dict[str, Criterion] = {}
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
        if not line.strip():
            continue
        criterion = read_line(line.strip())
        if criterion is None or criterion.weight not in WEIGHTS:
            raise UserError(
                f"{where} line {number} is not 'NAME (WEIGHT): MEANING' with a weight 1 to 5"
                f" and a name without ( ) : < >, at most 60 characters: {line[:60]!r}"
            )
        if criterion.name in rubric:
            raise UserError(f"{where} line {number} names {criterion.name!r} again; give each criterion its own name")
        rubric[criterion.name] = criterion
    if not rubric:
        raise UserError(f"{where} holds no criterion; write lines 'NAME (WEIGHT): MEANING'")
    return tuple(rubric.values())


@functools.cache
def primary_rubric(task: str) -> Rubric:
    """The primary rubric of a task: part of every judging prompt of that task.

    Raises:
        UserError: for a task there is no rubric for.

    >>> [criterion.name for criterion in primary_rubric("chat")]
    ['Usefulness', 'Truth', 'Clarity']
    """
    if task not in TASKS:
        raise UserError(f"task {task!r} is not one of {', '.join(TASKS)}.{nearest(task, TASKS)}")
    file = importlib.resources.files("patarm_lite") / "prompt_texts" / f"rubric_{task}.txt"
    return parse_rubric(file.read_text(encoding="utf-8"), file.name)
