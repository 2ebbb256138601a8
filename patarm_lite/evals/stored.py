"""The official figure from stored scores or decisions, of our judge or of anybody's.

A file of verdicts has one record an item (JSON lines, JSON, CSV, Parquet), with `id` and either `scores`, in the order
of the responses, or `decisions` where the benchmark has them; the official outputs' own field names are known too. A
score of null could not be read. What the item is (its subset, its label) stands in the record, as `bench -o` writes it,
or comes from the benchmark's data: then the file must have every item once, and no other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from patarm_lite.errors import UserError
from patarm_lite.evals.items import Answer, BenchItem, Benchmark, Record
from patarm_lite.pairs.files import read_rows

JUDGES = ("fingerprint", "judge", "judge_model", "judge_name")
"""Fields that may say which judge a verdict is of."""
SQLITE = b"SQLite format 3\x00"


def read_answers(
    benchmark: Benchmark, file: Path, items: Sequence[BenchItem] | None = None, unreadable: float | None = None
) -> list[Answer]:
    """The answers of a file of verdicts, in its order.

    Args:
        items: the benchmark's items; without them each record says its own subset and label.
        unreadable: a number that stands for a score that could not be read, such as -1.

    Raises:
        UserError: a file that can't be read, a record without scores or with the wrong number of them, verdicts of
            several judges, ids that are missing, twice there, or of no item.
    """
    records = records_of(file)
    one_of(records, JUDGES, "judges")
    found = _in_words_of(benchmark, records) if items is None else _matched(benchmark, file, records, items)
    return [benchmark.answer(record, item, unreadable) for record, item in found]


def records_of(file: Path) -> list[Record]:
    """The records of a file of verdicts.

    Raises:
        UserError: a file that can't be read, a store, a record that is no object.
    """
    if file.is_file() and not file.stat().st_size:
        raise UserError(f"{file} is empty; a file of verdicts has one record an item, with its id and scores")
    if file.is_file() and _beginning(file) == SQLITE:
        raise UserError(
            f"{file} is a store, and it may hold votes of several judges; type: patarm-lite bench JUDGE --store {file}"
        )
    return [Record(str(file), row.number, _object(file, row.number, row.value)) for row in read_rows(str(file))]


def rows_of(
    benchmark: Benchmark, answers: Sequence[Answer], expected: Sequence[Answer], fingerprint: str
) -> list[dict[str, Any]]:
    """Answers as records of a file that `read_answers` reads."""
    return [
        {
            "id": answer.item.id,
            **_about(benchmark, answer.item),
            "scores": list(answer.scores),
            "expected": list(other.scores),
            "fingerprint": fingerprint,
        }
        for answer, other in zip(answers, expected, strict=True)
    ]


def _about(benchmark: Benchmark, item: BenchItem) -> dict[str, Any]:
    """What an item is, in the benchmark's own field names."""
    if benchmark.name == "judgebench":
        return {"source": item.subset, "label": item.label}
    if benchmark.name == "rm-bench":
        return {"domain": item.subset}
    if benchmark.name == "hhh":
        return {"subsubset": item.subset}
    if benchmark.name == "rewardbench2":
        return {"subset": item.subset, "num_correct": item.correct}
    return {"subset": item.subset} | ({"label": item.label} if item.label else {})


def _in_words_of(benchmark: Benchmark, records: Sequence[Record]) -> list[tuple[Record, BenchItem]]:
    """Each record with the item it speaks of by itself. An id may not come twice."""
    items = [benchmark.keyed(record) for record in records]
    seen: dict[str, Record] = {}
    for record, item in zip(records, items, strict=True):
        if item.id in seen:
            raise record.wrong(f"item {item.id!r} is there twice, first at {seen[item.id].number}; give each item once")
        seen[item.id] = record
    return list(zip(records, items, strict=True))


def _matched(
    benchmark: Benchmark, file: Path, records: Sequence[Record], items: Sequence[BenchItem]
) -> list[tuple[Record, BenchItem]]:
    """Each record with the item of its id. A record may name an item by our id or by the benchmark's own."""
    by_id = {item.id: item for item in items}
    short: dict[str, list[BenchItem]] = {}
    for item in items:
        short.setdefault(item.id.rpartition("/")[2], []).append(item)
    found: dict[str, Record] = {}
    matched: list[tuple[Record, BenchItem]] = []
    extra: list[str] = []
    for record in records:
        name = record.name("id", "pair_id", "idx")
        own = short.get(name, [])
        one = by_id.get(name) or (own[0] if len(own) == 1 else None) or by_id.get(_full(benchmark, record))
        if one is None:
            extra.append(name)
        elif one.id in found:
            raise record.wrong(f"item {name!r} is there twice, first at {found[one.id].number}; give each item once")
        else:
            found[one.id] = record
            matched.append((record, one))
    missing = [item.id for item in items if item.id not in found]
    if missing or extra:
        parts = [f"misses {len(missing)} of {len(items)} items (first: {missing[0]!r})"] if missing else []
        parts += [f"holds {len(extra)} ids that are no item (first: {extra[0][:60]!r})"] if extra else []
        what = " and ".join(parts)
        raise UserError(f"{file} {what}; give every item once, or leave out --data to score what is there")
    return matched


def _full(benchmark: Benchmark, record: Record) -> str:
    """Our id of a record that says its own subset; "" where it doesn't."""
    try:
        return benchmark.keyed(record).id
    except UserError:
        return ""


def one_of(records: Sequence[Record], fields: Sequence[str], what: str) -> None:
    """Verdicts of several judges make no figure. `fields`: that may say whose a verdict is; `what`: who they are.

    Raises:
        UserError: a field that says two different things, or says something in some records and nothing in others.
    """
    for field in fields:
        first: dict[str, Record] = {}
        silent = [record for record in records if record.row.get(field) is None]
        for record in records:
            if isinstance(record.row.get(field), str):
                first.setdefault(record.row[field], record)
        if first and silent:
            name, where = next(iter(first.items()))
            raise silent[0].wrong(
                f"{field!r} is missing, and record {where.number} has {name[:40]!r}: say in each record whose it is, "
                "or in none"
            )
        if len(first) > 1:
            (one, _), (other, where) = list(first.items())[:2]
            raise where.wrong(
                f"{field!r} is {other[:40]!r}, and before it {one[:40]!r}: verdicts of {len(first)} {what} make no "
                "figure; give a file of each one's"
            )


def _object(file: Path, number: int, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise Record(str(file), number, {}).wrong("it is no object; a verdict is an object with id and scores")
    return value


def _beginning(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(len(SQLITE))
