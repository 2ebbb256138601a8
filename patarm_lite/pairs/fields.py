"""What all layouts share: the names of columns, drafts of pairs, and the parts of a row every layout reads."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from patarm_lite.errors import UserError, nearest
from patarm_lite.pairs.chats import turns_of_prompt
from patarm_lite.records import Turn

SIGNED = ("overall_preference", "preference_strength")
"""Columns where below 0 means the first response is better and above 0 the second."""

ALIASES: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "question", "instruction", "query", "context", "input", "history", "problem"),
    "input": ("input",),
    "system": ("system", "system_prompt"),
    "chosen": ("chosen", "chosen_response", "preferred", "response_chosen", "accepted"),
    "rejected": ("rejected", "rejected_response", "dispreferred", "response_rejected"),
    "response_a": (),
    "response_b": (),
    "winner": ("winner", "label", "labels", "preference", "human_preference", "better_response_id", *SIGNED),
    "responses": ("responses", "completions", "candidates", "generations", "answers", "outputs"),
    "scores": ("scores", "ratings", "ranks"),
    "response": ("response", "completion", "output", "answer"),
    "score": ("score", "rating", "overall_score", "helpfulness"),
    "task": (),
    "id": ("id", "pair_id", "prompt_id", "question_id", "idx", "uid", "task_id"),
    "source": ("source", "dataset", "data_source"),
    "reference": ("reference", "reference_answer"),
}
"""Field -> column names that mean it, lower case, spaces and hyphens as `_`."""

VALUES = ("first", "second", "tie")
"""Keys of a mapping that name values of the winner column instead of columns."""

TWO_RESPONSES = tuple(
    (f"{word}{joint}{a}", f"{word}{joint}{b}")
    for a, b in (("a", "b"), ("1", "2"), ("0", "1"))
    for word in ("response", "output", "answer", "completion", "conversation", "human_ref")
    for joint in ("_", "")
)


Fields = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Draft:
    """A pair as it stands in a record: the replies are unchecked values."""

    prompt: tuple[Turn, ...]
    chosen: Any
    rejected: Any
    meta: Mapping[str, Any] = field(default_factory=dict)


Drafts = list[Draft | str] | str


@dataclass(frozen=True, slots=True)
class Layout:
    """A layout as found in one source.

    `fields`: field -> column. `makes`: how many pairs a row becomes, in words. `read`: row -> drafts.
    """

    name: str
    fields: Fields
    makes: str
    read: Callable[[Mapping[str, Any]], Drafts]

    def words(self) -> str:
        """The layout's name, its mapping and what a row becomes."""
        mapped = ", ".join(f"{name} <- {column!r}" for name, column in self.fields.items())
        return f"{self.name}: {mapped}; {self.makes}"


def fold(name: str) -> str:
    """A column name or a label in the form the tables use."""
    return re.sub(r"[\s\-]+", "_", name.strip().lower())


def find_fields(columns: Iterable[str], mapping: Mapping[str, str]) -> dict[str, str]:
    """Field -> column: what the mapping names, then the aliases. Only columns that exist."""
    columns = list(columns)
    by_name = {fold(column): column for column in reversed(columns)}
    named = {name: column for name, column in mapping.items() if name not in VALUES and column in columns}
    fields: dict[str, str] = {}
    for name, aliases in ALIASES.items():
        alias = next((by_name[alias] for alias in aliases if alias in by_name), None)
        if name in named:
            fields[name] = named[name]
        elif alias is not None and alias not in named.values():
            fields[name] = alias
    for first, second in TWO_RESPONSES:
        if first in by_name and second in by_name and "response_a" not in fields and "response_b" not in fields:
            fields["response_a"], fields["response_b"] = by_name[first], by_name[second]
    if "input" in fields and "input" not in named and fold(fields.get("prompt", "")) != "instruction":
        del fields["input"]
    return fields


def check_mapping(mapping: Mapping[str, str], columns: Mapping[str, Iterable[str]]) -> None:
    """Refuse unknown fields, and columns that no source has.

    Args:
        columns: source -> its columns.
    """
    every = list(dict.fromkeys(column for some in columns.values() for column in some))
    for name, column in mapping.items():
        if name not in ALIASES and name not in VALUES:
            known = [*ALIASES, *VALUES]
            raise UserError(f"--map {name}={column}: {name!r} is not one of {', '.join(known)}.{nearest(name, known)}")
        if name in ALIASES and column not in every:
            seen = ", ".join(repr(one[:40]) for one in every[:25])
            raise UserError(
                f"--map {name}={column}: no source has a column {column!r}; they have {seen}.{nearest(column, every)}"
            )


def prompt_of(row: Mapping[str, Any], fields: Fields) -> tuple[Turn, ...] | str:
    """The prompt of a row with its system turn, or the reason why there is none."""
    column = fields.get("prompt")
    if column is None:
        return "there is no prompt column"
    if column not in row:
        return f"column {column!r} is missing"
    prompt = turns_of_prompt(row[column], row.get(fields["input"]) if "input" in fields else None)
    return prompt if isinstance(prompt, str) else with_system(prompt, row, fields)


def with_system(prompt: tuple[Turn, ...], row: Mapping[str, Any], fields: Fields) -> tuple[Turn, ...]:
    """The prompt with the system column's text as its first turn, where there is such a text and no system turn."""
    system = row.get(fields["system"]) if "system" in fields else None
    if isinstance(system, str) and system.strip() and not (prompt and prompt[0].role == "system"):
        return (Turn("system", system), *prompt)
    return prompt


def missing(row: Mapping[str, Any], fields: Fields, *names: str) -> str | None:
    """The reason to drop a row that lacks the column of one of these fields, or None."""
    lacking = [fields[name] for name in names if fields[name] not in row]
    return f"column {lacking[0]!r} is missing" if lacking else None


def left_over(row: Mapping[str, Any], fields: Fields, hidden: frozenset[str] = frozenset()) -> dict[str, Any]:
    """The single values of the columns no field uses, and what an object in `meta` holds.

    `score_chosen` becomes `chosen_score`, so that names of sides are always in front.
    """
    used = set(fields.values()) | hidden
    rest: dict[str, Any] = {}
    for column, value in row.items():
        if column == "meta" and isinstance(value, dict):
            rest |= value
        elif column not in used and isinstance(value, str | int | float | bool):
            match = re.fullmatch(r"(.+)_(chosen|rejected)", column)
            rest[f"{match[2]}_{match[1]}" if match else column] = value
    return rest


def label(value: Any) -> str | None:
    """A winner column's value in comparable form; None for what can't be a label.

    >>> label(1.0), label("Model A"), label([1])
    ('1', 'model_a', None)
    """
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        return str(int(value))
    if isinstance(value, int | float | str):
        return fold(str(value))
    return None


def number(value: Any) -> float | None:
    """A finite number, also from a string as CSV has it; None otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None
