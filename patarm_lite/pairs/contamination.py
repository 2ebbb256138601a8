"""Do the prompts of some pairs occur in benchmark files? Two tests, both on the last user message.

Exact: the same message, case and white space folded. Overlap: at least one run of 13 words (letters, digits and
underscores; case folded) in common, which a message of fewer words can't have. What was said before the last user
message, and the replies, are not compared.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from patarm_lite.errors import UserError
from patarm_lite.pairs.chats import (
    looks_like_messages,
    looks_like_transcript,
    turns_of_messages,
    turns_of_prompt,
    turns_of_transcript,
)
from patarm_lite.pairs.fields import find_fields
from patarm_lite.pairs.files import read_rows
from patarm_lite.pairs.tasks import last_user_message
from patarm_lite.records import Pair

RUN = 13
"""Words in a run that counts as overlap: the length of benchmark checks since GPT-3 (arXiv 2005.14165, appendix C)."""


@dataclass(frozen=True, slots=True)
class Match:
    """A pair whose prompt occurs in a benchmark. `against_row` is the benchmark's first such row."""

    pair: str
    file: str
    row: int
    against_row: int


@dataclass(frozen=True, slots=True)
class Overlap:
    """What one benchmark file shares with the pairs.

    `prompts`: its rows whose prompt was found. `unread`: rows without one, which were not compared.
    `exact`: pairs with the same last user message. `runs`: further pairs that share a run of 13 words.
    """

    against: str
    prompts: int
    unread: int
    exact: tuple[Match, ...]
    runs: tuple[Match, ...]


@dataclass(frozen=True, slots=True)
class Contamination:
    """The pairs compared, and one entry a benchmark file."""

    pairs: int
    files: tuple[Overlap, ...]


def contamination(pairs: Sequence[Pair], against: Sequence[str]) -> Contamination:
    """Compare the pairs' prompts with those of benchmark files (any format and any layout that names a prompt).

    Raises:
        UserError: a file that can't be read, or in which no row has a prompt.
    """
    messages = [last_user_message(pair.prompt) for pair in pairs]
    exact_keys = [folded(message) for message in messages]
    return Contamination(len(pairs), tuple(_overlap(pairs, messages, exact_keys, name) for name in against))


def folded(message: str) -> str:
    """A message with case and white space folded.

    >>> folded("  What IS\\n this?")
    'what is this?'
    """
    return " ".join(message.casefold().split())


def word_runs(message: str) -> Iterator[tuple[str, ...]]:
    """All runs of 13 words in a message."""
    words = re.findall(r"\w+", message.casefold())
    return zip(*(words[start:] for start in range(RUN)), strict=False)


def _overlap(pairs: Sequence[Pair], messages: Sequence[str], keys: Sequence[str], against: str) -> Overlap:
    rows = read_rows(against)
    columns = dict.fromkeys(column for row in rows if isinstance(row.value, dict) for column in row.value)
    fields = find_fields(columns, {})
    by_message: dict[str, int] = {}
    by_run: dict[tuple[str, ...], int] = {}
    unread = 0
    for row in rows:
        found = benchmark_messages(row.value, fields)
        unread += not found
        for message in found:
            by_message.setdefault(folded(message), row.number)
            for run in word_runs(message):
                by_run.setdefault(run, row.number)
    if not by_message:
        seen = ", ".join(map(repr, columns))[:300]
        raise UserError(f"{against}: no row has a prompt to compare with; it has the columns {seen}")
    exact, runs = [], []
    for pair, message, key in zip(pairs, messages, keys, strict=True):
        file, number = str(pair.meta.get("file", pair.source)), int(pair.meta.get("row", 0))
        if key in by_message:
            exact.append(Match(pair.id, file, number, by_message[key]))
            continue
        shared = next((by_run[run] for run in word_runs(message) if run in by_run), None)
        if shared is not None:
            runs.append(Match(pair.id, file, number, shared))
    return Overlap(against, len(rows) - unread, unread, tuple(exact), tuple(runs))


def benchmark_messages(row: Any, fields: Mapping[str, str]) -> list[str]:
    """The forms the last user message of a benchmark's row may have in pairs; none where there is no prompt.

    An instruction with an input counts alone and joined; a conversation counts by its last user turn.
    """
    if not isinstance(row, dict):
        return []
    found = []
    prompt = row.get(fields.get("prompt", ""))
    extra = row.get(fields.get("input", "")) if "input" in fields else None
    for value in (turns_of_prompt(prompt), turns_of_prompt(prompt, extra)):
        if not isinstance(value, str) and value:
            found.append(last_user_message(value))
    for name in ("chosen", "response_a"):
        side: Any = row.get(fields.get(name, ""))
        turns: Any = turns_of_transcript(side) if looks_like_transcript(side) else ()
        turns = turns_of_messages(side) if looks_like_messages(side) else turns
        if turns and not isinstance(turns, str):
            found.append(last_user_message(turns))
    return [message for message in dict.fromkeys(found) if message.strip()]
