"""The official figures of IFEval and InFoBench from stored responses or decisions, of anybody's model.

IFEval: `response` beside `key` or `prompt` (the official code's output_response format) is checked anew, which needs
the benchmark's file; without it, or without responses, `strict` and `loose` (as `bench-model` writes them) or
`follow_instruction_list` (as the official code does, strict or loose) beside `instruction_id_list` are counted.
InFoBench: `id` and `eval`, a list of true, false and null.

Texts are scored as they stand: no thought is taken out of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from patarm_lite.errors import UserError
from patarm_lite.evals import ifeval, infobench
from patarm_lite.evals.assistant_data import AssistantBenchmark, Loaded, files_in, load
from patarm_lite.evals.bench_model import figures, known_of
from patarm_lite.evals.ifeval import LOOSE, STORED, STRICT, Checkers, Followed, IfevalItem
from patarm_lite.evals.infobench import Evaluated, InfobenchItem
from patarm_lite.evals.items import Record
from patarm_lite.evals.stored import JUDGES, one_of, records_of
from patarm_lite.pairs.chats import kind

MODELS = ("model", "model_name", "generator")
"""Fields that may say which model a response is of."""
EVALUATORS = ("evaluator", "eval_model")

Json = dict[str, Any]


def score_stored(benchmark: AssistantBenchmark, file: Path, data: Path | None, seed: int) -> Json:
    """A benchmark's figures from a file, as plain JSON values.

    Args:
        data: the benchmark's file, or the folder that holds it; then every item must be there once.

    Raises:
        UserError: a file that can't be read, a record without what is scored, responses of several models, ids that are
            missing, twice there, or of no item.
    """
    loaded = None if data is None else _loaded(benchmark, data)
    records = records_of(file)
    one_of(records, (*MODELS, *EVALUATORS, *JUDGES), "models")
    notes: list[str] = []
    found: Sequence[Followed] | Sequence[Evaluated]
    if benchmark.name == "ifeval":
        found, notes = _followed(file, records, loaded)
        part = ifeval.part_of([one.instructions for one in found])
    else:
        found = _evaluated(file, records, loaded)
        known = all(one.questions is not None for one in found)
        part = infobench.part_of(len(found), sum(one.questions or 0 for one in found) if known else None)
    told = figures(found, seed)
    return {"benchmark": benchmark.name, **known_of(benchmark, part), "items": len(found), **told, "notes": notes}


def _loaded(benchmark: AssistantBenchmark, data: Path) -> Loaded:
    files = [data] if data.is_file() else files_in(data).get(benchmark.name)
    if not files:
        raise UserError(f"{data} holds no file of {benchmark.title}; name one {benchmark.name}.jsonl")
    return load(benchmark, files)


# --- IFEval ---


def _followed(file: Path, records: Sequence[Record], loaded: Loaded | None) -> tuple[list[Followed], list[str]]:
    """What each record followed, and what must be said of it."""
    fresh = [loaded is not None and "response" in record.row for record in records]
    if any(fresh) and not all(fresh):
        raise records[fresh.index(False)].wrong("there is no 'response', and other records have one; give it to each")
    if loaded is None:
        return _distinct(records, [_stored(record, None) for record in records]), []
    items = [item for item in loaded.items if isinstance(item, IfevalItem)]
    names = {item.id: item for item in items} | {item.prompt: item for item in items}
    matched = _matched(file, records, names, ("key", "id", "prompt"), loaded)
    if not all(fresh):
        return [_stored(record, item) for record, item in matched], []
    checkers = Checkers.load()
    checkers.check(items)
    found = [checkers.followed(item, record.text("response")) for record, item in matched]
    note = ifeval.stand_in_note(checkers.stand_ins(items), sum(len(item.instructions) for item in items))
    return found, [note] if note else []


def _stored(record: Record, item: IfevalItem | None) -> Followed:
    """The truths of a record that says them itself."""
    lists = {STRICT: STRICT, LOOSE: LOOSE} if STRICT in record.row else {STORED: "follow_instruction_list"}
    if "response" in record.row and not set(lists.values()) <= set(record.row):
        raise record.wrong("a response is checked by the benchmark's own file; give it with --data FILE")
    record.need([*lists.values(), *([] if item else ["instruction_id_list"])], "a stored result of IFEval")
    instructions = item.instructions if item else ifeval.instructions_of(record)
    found = {}
    for column, name in lists.items():
        truths = record.row[name]
        if not isinstance(truths, list) or not all(isinstance(one, bool) for one in truths):
            raise record.wrong(f"{name!r} is no list of true and false")
        if len(truths) != len(instructions):
            raise record.wrong(f"{name!r} has {len(truths)} values, and the prompt {len(instructions)} instructions")
        found[column] = tuple(truths)
    return Followed(item.id if item else record.name("key", "id", "prompt"), instructions, found)


def _distinct(records: Sequence[Record], found: list[Followed]) -> list[Followed]:
    """The same, where no prompt is there twice and all records are of one kind."""
    seen: dict[str, Record] = {}
    for record, one in zip(records, found, strict=True):
        if one.id in seen:
            raise _twice(record, one.id, seen[one.id])
        seen[one.id] = record
        if set(one.lists) != set(found[0].lists):
            raise record.wrong(f"it holds {', '.join(one.lists)}, and the first record {', '.join(found[0].lists)}")
    return found


# --- InFoBench ---


def _evaluated(file: Path, records: Sequence[Record], loaded: Loaded | None) -> list[Evaluated]:
    if loaded is not None:
        items = {item.id: item for item in loaded.items if isinstance(item, InfobenchItem)}
        matched = _matched(file, records, items, ("id",), loaded)
        return [_answers(record, item.subset, item.questions, item.labels) for record, item in matched]
    seen: dict[str, Record] = {}
    found = []
    for record in records:
        subset, questions = record.row.get("subset"), None
        if "decomposed_questions" in record.row:
            questions = infobench.questions_of(record)
        labels = infobench.labels_of(record, len(questions)) if questions else ()
        one = _answers(record, subset if isinstance(subset, str) else "", questions, labels)
        if one.id in seen:
            raise _twice(record, one.id, seen[one.id])
        seen[one.id] = record
        found.append(one)
    return found


def _answers(
    record: Record, subset: str, questions: tuple[str, ...] | None, labels: tuple[tuple[str, ...], ...]
) -> Evaluated:
    """The answers of a record; without its questions nothing is known of those that were not asked."""
    record.need(("id", "eval"), "a stored result of InFoBench")
    given = record.row["eval"]
    if not isinstance(given, list) or not given or not all(one is None or isinstance(one, bool) for one in given):
        what = "an empty list" if given == [] else f"{str(given)[:40]!r}" if isinstance(given, list) else kind(given)
        raise record.wrong(f"'eval' is {what}, not a list of true, false and null")
    count = None if questions is None else len(questions)
    if count is not None and (len(given) > count or (len(given) < count and given[-1] is not None)):
        raise record.wrong(
            f"'eval' has {len(given)} answers, and the instruction {count} questions; only one that ends with null (an "
            "answer that could not be read) may be shorter"
        )
    return Evaluated(record.name("id"), subset, tuple(given), count, labels)


# --- ids ---


def _matched(
    file: Path, records: Sequence[Record], names: Mapping[str, Any], fields: Sequence[str], loaded: Loaded
) -> list[tuple[Record, Any]]:
    """Each record with the item that its fields name: every item once, and no other.

    Raises:
        UserError: ids that are missing, of no item, or there twice; a record whose fields name two items.
    """
    seen: dict[str, Record] = {}
    found, extra = [], []
    for record in records:
        name = record.name(*fields)
        told = [str(record.row[field]) for field in fields if field in record.row]
        items = {names[one].id: names[one] for one in told if one in names}
        if len(items) > 1:
            raise record.wrong(f"its fields are of two items, {' and '.join(map(repr, items))}")
        if not items:
            extra.append(name)
            continue
        ((own, item),) = items.items()
        if own in seen:
            raise _twice(record, own, seen[own])
        seen[own] = record
        found.append((record, item))
    missing = [item.id for item in loaded.items if item.id not in seen]
    if missing or extra:
        parts = [f"misses {len(missing)} of {len(loaded.items)} items (first: {missing[0]!r})"] if missing else []
        parts += [f"holds {len(extra)} ids that are no item (first: {extra[0][:60]!r})"] if extra else []
        raise UserError(f"{file} {' and '.join(parts)}; give every item of {loaded.source} once, and no other")
    return found


def _twice(record: Record, name: str, first: Record) -> UserError:
    return record.wrong(f"item {name[:60]!r} is there twice, first at {first.number}; give each item once")
