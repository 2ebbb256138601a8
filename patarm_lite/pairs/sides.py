"""Layouts with a chosen and a rejected column: text, chat messages, transcripts, lists of replies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from patarm_lite.pairs.chats import (
    before_last_reply,
    kind,
    looks_like_messages,
    looks_like_transcript,
    turns_of_messages,
    turns_of_transcript,
)
from patarm_lite.pairs.fields import Draft, Drafts, Fields, Layout, fold, left_over, missing, prompt_of, with_system
from patarm_lite.records import Turn


def _shape(value: Any) -> str:
    if looks_like_messages(value):
        return "messages"
    return "list" if isinstance(value, list) else "text"


def sides_layout(
    records: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    fields: Fields,
    mapping: Mapping[str, str],
    where: str,
    min_gap: float,
) -> Layout | None:
    """The layout of a source with a chosen and a rejected column; most of its values say which. None if it has none."""
    if not {"chosen", "rejected"} <= fields.keys():
        return None
    sides = [(record.get(fields["chosen"]), record.get(fields["rejected"])) for record in records]
    shapes = Counter(_shape(side) for both in sides for side in both if side is not None)
    shape = max(("text", "messages", "list"), key=lambda name: shapes[name])
    used = ("prompt", "input", "system", "chosen", "rejected", "task", "id", "source", "reference")
    kept = {name: fields[name] for name in used if name in fields}
    names = {fold(column) for column in columns}
    if shape == "messages":
        return Layout("whole conversations", kept, "1 pair a row", lambda row: conversations(row, kept))
    if shape == "list" and "prompt" in kept:
        if "num_correct" in names:
            name, makes = "RewardBench 2", "each chosen with each rejected reply: best-of-4 makes 3 pairs a row"
        elif "domain" in names and _three_by_three(sides):
            name, makes = "RM-Bench", "3 chosen with 3 rejected replies: 9 pairs a row"
        else:
            name, makes = "lists of chosen and rejected replies", "each chosen with each rejected reply makes a pair"
        return Layout(name, kept, makes, lambda row: reply_lists(row, kept))
    if shape == "text" and "prompt" not in mapping and _mostly_transcripts(sides):
        kept.pop("prompt", None)
        kept.pop("input", None)
        return Layout("Human:/Assistant: transcripts", kept, "1 pair a row", lambda row: transcripts(row, kept))
    if "prompt" not in kept:
        return None
    if shape == "text" and "subset" in names and names & {"chosen_model", "rejected_model", "subsubset"}:
        return Layout("RewardBench", kept, "1 pair a row", lambda row: plain(row, kept))
    return Layout("prompt, chosen, rejected", kept, "1 pair a row", lambda row: plain(row, kept))


def _three_by_three(sides: Sequence[tuple[Any, Any]]) -> bool:
    lists = [both for both in sides if isinstance(both[0], list) and isinstance(both[1], list)]
    return bool(lists) and all(len(side) == 3 for both in lists for side in both)


def _mostly_transcripts(sides: Sequence[tuple[Any, Any]]) -> bool:
    fitting = sum(looks_like_transcript(first) and looks_like_transcript(second) for first, second in sides)
    return 2 * fitting > len(sides)


def plain(row: Mapping[str, Any], fields: Fields) -> Drafts:
    """prompt/chosen/rejected, the replies as text."""
    lacking = missing(row, fields, "chosen", "rejected")
    prompt = lacking or prompt_of(row, fields)
    if isinstance(prompt, str):
        return prompt
    return [Draft(prompt, row[fields["chosen"]], row[fields["rejected"]], left_over(row, fields))]


def conversations(row: Mapping[str, Any], fields: Fields) -> Drafts:
    """Chosen and rejected as chat messages: whole conversations with a common beginning, or the last reply alone.

    The common beginning is the prompt; where it is empty the prompt column is.
    """
    lacking = missing(row, fields, "chosen", "rejected")
    if lacking:
        return lacking
    sides = []
    for name in ("chosen", "rejected"):
        value = row[fields[name]]
        if not isinstance(value, list):
            return f"the {name} side is {kind(value)}, not chat messages"
        turns = turns_of_messages(value)
        if isinstance(turns, str):
            return turns
        sides.append(turns)
    common = before_last_reply(*sides)
    if isinstance(common, str):
        return common
    prompt: tuple[Turn, ...] | str = common[0]
    if not common[0] or common[0][0].role == "assistant":
        own = prompt_of(row, fields)
        prompt = own if isinstance(own, str) else own + common[0]
    if isinstance(prompt, str):
        return prompt
    return [Draft(with_system(prompt, row, fields), common[1], common[2], left_over(row, fields))]


def transcripts(row: Mapping[str, Any], fields: Fields) -> Drafts:
    """Chosen and rejected as `Human:`/`Assistant:` transcripts with a common beginning (hh-rlhf)."""
    lacking = missing(row, fields, "chosen", "rejected")
    if lacking:
        return lacking
    values = [row[fields[name]] for name in ("chosen", "rejected")]
    if not all(looks_like_transcript(value) for value in values):
        return "not a Human:/Assistant: transcript on both sides"
    common = before_last_reply(*map(turns_of_transcript, values))
    if isinstance(common, str):
        return common
    return [Draft(with_system(common[0], row, fields), common[1], common[2], left_over(row, fields))]


def reply_lists(row: Mapping[str, Any], fields: Fields) -> Drafts:
    """Chosen and rejected as lists of replies: each chosen one with each rejected one (RewardBench 2, RM-Bench).

    meta `chosen_index` and `rejected_index` are the places in the lists, from 0; in RM-Bench 0 is concise,
    1 detailed, 2 detailed with markdown.
    """
    lacking = missing(row, fields, "chosen", "rejected")
    prompt = lacking or prompt_of(row, fields)
    if isinstance(prompt, str):
        return prompt
    chosen, rejected = row[fields["chosen"]], row[fields["rejected"]]
    for name, value in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(value, list):
            return f"the {name} side is {kind(value)}, not a list of replies"
        if not value:
            return f"the {name} side is an empty list"
    rest = left_over(row, fields)
    return [
        Draft(prompt, good, bad, rest | {"chosen_index": i, "rejected_index": j})
        for i, good in enumerate(chosen)
        for j, bad in enumerate(rejected)
    ]
