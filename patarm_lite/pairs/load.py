"""Sources -> pairs. Every row becomes a pair or is in `dropped` with its number and the reason."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from patarm_lite.errors import UserError, nearest
from patarm_lite.pairs.checks import key, unfit
from patarm_lite.pairs.fields import Draft, Layout, check_mapping
from patarm_lite.pairs.files import read_rows, stem
from patarm_lite.pairs.layouts import find_layout
from patarm_lite.pairs.tasks import task_of
from patarm_lite.records import TASKS, Pair


@dataclass(frozen=True)
class Dropped:
    """A row, or one of the pairs of a row, that was left out. What stands before a colon is the kind of reason."""

    source: str
    row: int
    reason: str


@dataclass(frozen=True)
class LoadedPairs:
    """What came out of some sources.

    `layouts`: source -> the layout found, its mapping and where tasks came from, in words. `rows`: source -> rows.
    Each pair's meta holds `file` and `row` (where it stood) and `task_from` (where its task came from, in words).
    """

    pairs: list[Pair]
    dropped: list[Dropped]
    layouts: dict[str, str]
    rows: dict[str, int]


def load_pairs(
    sources: Sequence[str],
    *,
    mapping: Mapping[str, str] | None = None,
    task: str = "auto",
    revision: str = "main",
    offline: bool = False,
    min_gap: float = 1.0,
) -> LoadedPairs:
    """Read preference pairs from files, stdin (`-`) and hub data sets.

    Args:
        sources: see `patarm_lite.pairs.files`; the layout of each is found from its columns.
        mapping: field -> column for columns with other names, e.g. {"prompt": "question"}; `first`, `second` and
            `tie` name values of the winner column. Holds for every source that has the column.
        task: one task for all pairs, or "auto": the column that names it, else words of the prompt.
        revision: of hub data sets. offline: refuse them.
        min_gap: smallest difference of two ratings that makes a pair of two rated responses.

    Raises:
        UserError: no source, or one given twice; what `read_rows` and `find_layout` raise; unknown task or mapping.
    """
    mapping = dict(mapping or {})
    if task not in (*TASKS, "auto"):
        raise UserError(f"task {task!r} is not auto or one of {', '.join(TASKS)}.{nearest(task, TASKS)}")
    if not min_gap > 0 or not math.isfinite(min_gap):
        raise UserError(f"the smallest rating gap is {min_gap}; it must be above 0, or ties would become pairs")
    if not sources:
        raise UserError("no pairs are named; give a file, - for stdin, or a hub data set id")
    twice = [source for source, count in Counter(sources).items() if count > 1]
    if twice:
        raise UserError(f"{twice[0]} is given twice; name each source once")
    rows = {source: read_rows(source, revision=revision, offline=offline) for source in sources}
    columns = {s: {c for row in some if isinstance(row.value, dict) for c in row.value} for s, some in rows.items()}
    check_mapping(mapping, columns)
    pairs: list[Pair] = []
    dropped: list[Dropped] = []
    layouts: dict[str, str] = {}
    seen: dict[Any, Pair] = {}
    ids: set[str] = set()
    for source in sources:
        layout, records = find_layout(rows[source], mapping, "stdin" if source == "-" else source, min_gap)
        origins: Counter[str] = Counter()
        for row in records:
            drafts = unsound(row.value) or layout.read(row.value)
            for place, draft in enumerate([drafts] if isinstance(drafts, str) else drafts):
                reason = draft if isinstance(draft, str) else unfit(draft)
                if reason is not None or isinstance(draft, str):
                    dropped.append(Dropped(source, row.number, str(reason)))
                    continue
                several = place if len(drafts) > 1 else None
                pair = _pair(draft, row.value, layout, source, row.number, several, task, ids)
                first = seen.setdefault(key(pair), pair)
                if first is not pair:
                    where = f"row {first.meta['row']} of {first.meta['file']}"
                    dropped.append(Dropped(source, row.number, f"duplicate: the same pair as {where}"))
                    continue
                ids.add(pair.id)
                origins[str(pair.meta["task_from"])] += 1
                pairs.append(pair)
        told = ", ".join(f"{origin} ({count})" for origin, count in origins.most_common())
        layouts[source] = layout.words() + (f"; task <- {told}" if told else "")
    return LoadedPairs(pairs, dropped, layouts, {source: len(some) for source, some in rows.items()})


def unsound(row: Any) -> str | None:
    """Why a row can't be read as a record at all, or None."""
    if not isinstance(row, dict):
        return "the row is not a record with columns"
    try:
        json.dumps(row, ensure_ascii=False, default=str).encode("utf-8")
    except UnicodeEncodeError:
        return "a text holds half a surrogate pair, which is no character"
    except RecursionError:
        return "the row is nested too deeply"
    return None


def _pair(
    draft: Draft,
    row: Mapping[str, Any],
    layout: Layout,
    source: str,
    number: int,
    place: int | None,
    task: str,
    ids: set[str],
) -> Pair:
    def single(name: str) -> str | None:
        value = row.get(layout.fields[name]) if name in layout.fields else None
        usable = isinstance(value, str | int) and not isinstance(value, bool) and str(value).strip()
        return str(value) if usable else None

    found_task, origin = task_of(row, draft.prompt, layout.fields, task, source, number)
    own = single("id")
    named = own if own is not None and not own.isdecimal() else f"{stem(source)}-{own or number}"
    if place is not None:
        named += f"-{place}"
    unique, count = named, 2
    while unique in ids:
        unique, count = f"{named}~{count}", count + 1
    meta = {**draft.meta, "file": source, "row": number, "task_from": origin}
    return Pair(
        draft.prompt,
        draft.chosen,
        draft.rejected,
        found_task,
        unique,
        single("source") or stem(source),
        single("reference"),
        meta,
    )
