"""Layouts with two responses and something that names the better one: a label, a sign, winner columns, annotators."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from patarm_lite.errors import UserError
from patarm_lite.pairs.chats import before_last_reply, kind, looks_like_messages, turns_of_messages
from patarm_lite.pairs.fields import (
    SIGNED,
    VALUES,
    Draft,
    Drafts,
    Fields,
    Layout,
    fold,
    label,
    left_over,
    missing,
    number,
    prompt_of,
)
from patarm_lite.records import Turn

_WORDS_FIRST = ("a", "a>b", "a>>b", "[[a]]", "[[a>b]]", "[[a>>b]]", "model_a", "assistant_a", "first")
_WORDS_SECOND = ("b", "b>a", "b>>a", "[[b]]", "[[b>a]]", "[[b>>a]]", "model_b", "assistant_b", "second")
_WORDS_TIE = ("tie", "tie_(bothbad)", "both", "bothbad", "both_bad", "neither", "draw", "a=b", "[[a=b]]", "[[c]]")


def winner_layout(
    records: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    fields: Fields,
    mapping: Mapping[str, str],
    where: str,
    min_gap: float,
) -> Layout | None:
    """The layout of a source with two responses and a winner; None if its columns have none.

    Raises:
        UserError: a winner column whose values are ambiguous (see `winner_words`).
    """
    if not {"response_a", "response_b"} <= fields.keys():
        return None
    whole = fold(fields["response_a"]).startswith("conversation")
    if not whole and "prompt" not in fields:
        return None
    used = ("prompt", "input", "system", "response_a", "response_b", "task", "id", "source", "reference")
    kept = {name: fields[name] for name in used if name in fields}
    makes = "1 pair a row, ties dropped"
    annotators = [column for column in columns if re.fullmatch(r"annotator_?\d+", fold(column))]
    one_hot = {fold(c): c for c in columns if fold(c) in ("winner_model_a", "winner_model_b", "winner_tie")}
    if annotators and "winner" not in mapping:
        makes += f"; winner <- the majority of {', '.join(annotators)} (0 tie, 1 first, 2 second)"
        hidden = frozenset(annotators)
        return Layout(
            "two responses and annotators",
            kept,
            makes,
            lambda row: two_sides(row, kept, majority(row, annotators), hidden),
        )
    if {"winner_model_a", "winner_model_b"} <= one_hot.keys() and "winner" not in mapping:
        makes += f"; winner <- the column that holds 1 of {', '.join(one_hot.values())}"
        hidden = frozenset(one_hot.values())
        return Layout(
            "two responses and winner columns", kept, makes, lambda row: two_sides(row, kept, hot(row, one_hot), hidden)
        )
    if "winner" not in fields:
        return None
    column = kept["winner"] = fields["winner"]
    if fold(column) in SIGNED and not mapping.keys() & set(VALUES):
        makes += "; below 0 the first is better, above 0 the second"
        return Layout("two responses and a winner", kept, makes, lambda row: two_sides(row, kept, sign(row, column)))
    words = winner_words([record.get(column) for record in records], fields, mapping, where)
    makes += "; " + ", ".join(f"{value!r} means {side}" for value, side in words.items())
    return Layout(
        "two responses and a winner", kept, makes, lambda row: two_sides(row, kept, named(row, column, words))
    )


def winner_words(values: Sequence[Any], fields: Fields, mapping: Mapping[str, str], where: str) -> dict[str, str]:
    """Which values of the winner column mean the first response, the second, a tie.

    Numbers count only where they can mean one thing: as the endings of the two columns' names (`output_1`,
    `output_2` and labels 1, 2), or as 1 and 2, both seen, for `_a` and `_b`. 0 beside them may be a tie or a
    response, and 2 beside 0 and 1 likewise: then the user must say.

    Raises:
        UserError: ambiguous numbers, or no value understood.
    """
    seen = list(dict.fromkeys(found for found in map(label, values) if found is not None))
    stated = {fold(mapping[side]): side for side in VALUES if side in mapping}
    if stated:
        if not {"first", "second"} <= set(stated.values()):
            raise UserError("--map names the values of only one response; give both: first=1,second=2 (and tie=0)")
        return stated
    names = [fold(fields[name]) for name in ("response_a", "response_b")]
    endings = [name[-1:] for name in names]
    known = (
        dict.fromkeys(_WORDS_FIRST, "first") | dict.fromkeys(_WORDS_SECOND, "second") | dict.fromkeys(_WORDS_TIE, "tie")
    )
    known |= {names[0]: "first", names[1]: "second"}
    numbers = {found for found in seen if re.fullmatch(r"-?\d+(\.\d+)?", found)}
    if endings[0].isdecimal() and numbers <= set(endings):
        known |= {endings[0]: "first", endings[1]: "second"}
    elif numbers == {"1", "2"}:
        known |= {"1": "first", "2": "second"}
    elif numbers:
        raise UserError(
            f"{where}: column {fields['winner']!r} holds {', '.join(sorted(numbers)[:6])}, and which response each "
            f"number means is not certain; say it, e.g. --map winner={fields['winner']},first=1,second=2,tie=0"
        )
    words = {found: known[found] for found in seen if found in known}
    if not words:
        held = ", ".join(repr(value[:20]) for value in seen[:5]) or "nothing"
        raise UserError(
            f"{where}: column {fields['winner']!r} holds {held}, which names no response; "
            f"say it, e.g. --map winner={fields['winner']},first=left,second=right,tie=same"
        )
    return words


def named(row: Mapping[str, Any], column: str, words: Mapping[str, str]) -> str:
    """The side that the winner column names, or a reason that begins with 'the winner'."""
    if column not in row:
        return f"column {column!r} is missing"
    found = label(row[column])
    if found is None or found not in words:
        shown = kind(row[column]) if found is None else repr(str(row[column])[:30])
        return f"the winner is not understood: {shown}"
    return words[found]


def sign(row: Mapping[str, Any], column: str) -> str:
    """The side of a signed preference: below 0 the first, above 0 the second."""
    value = number(row.get(column))
    if value is None:
        return f"the winner is not understood: {kind(row.get(column))}"
    return "first" if value < 0 else "second" if value > 0 else "tie"


def majority(row: Mapping[str, Any], annotators: Sequence[str]) -> str:
    """The side more than half of the annotators chose (0 tie, 1 first, 2 second); 'tie' where they chose a tie."""
    votes = [label(row.get(column)) for column in annotators]
    if any(vote not in ("0", "1", "2") for vote in votes):
        return "the winner is not understood: an annotator's vote is not 0, 1 or 2"
    vote, count = Counter(votes).most_common(1)[0]
    if 2 * count <= len(votes):
        return "the annotators have no majority"
    return {"0": "tie", "1": "first", "2": "second"}[str(vote)]


def hot(row: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    """The side whose winner column holds 1."""
    sides = {"winner_model_a": "first", "winner_model_b": "second", "winner_tie": "tie"}
    won = [sides[name] for name, column in columns.items() if label(row.get(column)) in ("1", "true")]
    return won[0] if len(won) == 1 else f"the winner is not understood: {len(won)} of the winner columns hold 1"


def two_sides(row: Mapping[str, Any], fields: Fields, side: str, hidden: frozenset[str] = frozenset()) -> Drafts:
    """Two responses and the side that won -> one draft; columns ending in the side's letter become `chosen_*`."""
    lacking = missing(row, fields, "response_a", "response_b")
    if lacking:
        return lacking
    if side not in ("first", "second"):
        return side
    first, second = row[fields["response_a"]], row[fields["response_b"]]
    prompt: tuple[Turn, ...] | str
    if looks_like_messages(first) and looks_like_messages(second):
        turns = turns_of_messages(first), turns_of_messages(second)
        if isinstance(turns[0], str) or isinstance(turns[1], str):
            return next(turn for turn in turns if isinstance(turn, str))
        common = before_last_reply(turns[0], turns[1])
        if isinstance(common, str):
            return common
        prompt, first, second = common
        prompt = prompt or prompt_of(row, fields)
    else:
        prompt = prompt_of(row, fields)
        packed = _packed_turns(row, fields)
        if packed is not None:
            if len(packed[0]) != 1:
                return "the conversations differ before the last reply"
            prompt, first, second = (Turn("user", str(packed[0][0])),), packed[1][0], packed[2][0]
    if isinstance(prompt, str):
        return prompt
    rest = left_over(row, fields, hidden)
    for name in list(rest):
        twin = _twin(name, fields)
        if twin is not None and twin in rest and name in rest:
            a, b = rest.pop(name), rest.pop(twin)
            stem = fold(name)[:-2]
            rest[f"chosen_{stem}"], rest[f"rejected_{stem}"] = (a, b) if side == "first" else (b, a)
    if side == "second":
        first, second = second, first
    return [Draft(prompt, first, second, rest)]


def _twin(name: str, fields: Fields) -> str | None:
    """`model_b` for `model_a`, where the two responses end in `a` and `b`."""
    ends = fold(fields["response_a"])[-1:], fold(fields["response_b"])[-1:]
    return name[:-1] + fields["response_b"][-1:] if len(name) > 2 and fold(name)[-2:] == f"_{ends[0]}" else None


def _packed_turns(row: Mapping[str, Any], fields: Fields) -> tuple[list[Any], list[Any], list[Any]] | None:
    """Prompt and responses as JSON lists of texts in strings, one a turn (arena exports); None if they are not."""
    if "prompt" not in fields:
        return None
    lists = []
    for name in ("prompt", "response_a", "response_b"):
        value = row.get(fields[name])
        if not isinstance(value, str) or not value.startswith("["):
            return None
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
        if not isinstance(value, list) or not value or not isinstance(value[0], str | None):
            return None
        lists.append(value)
    return (lists[0], lists[1], lists[2]) if len(set(map(len, lists))) == 1 and isinstance(lists[0][0], str) else None
