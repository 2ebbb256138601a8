"""The benchmarks of assistant models by name, and their items: from local files or from the hub, whole or a part.

A file or folder in the folder of data belongs to the benchmark whose name its own begins with (`ifeval/`,
`InFoBench.jsonl`). From the hub everything is read at one commit, which every table names.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from patarm_lite.errors import UserError, nearest
from patarm_lite.evals import ifeval, infobench
from patarm_lite.evals.bench_data import is_data, shared_out
from patarm_lite.evals.ifeval import IfevalItem
from patarm_lite.evals.infobench import InfobenchItem
from patarm_lite.evals.items import FOREIGN, Record, folded
from patarm_lite.pairs.files import read_source

AnyItem = IfevalItem | InfobenchItem


@dataclass(frozen=True, slots=True)
class AssistantBenchmark:
    """A benchmark of assistant models.

    Attributes:
        name: as it is typed, and as its files begin. title: as it is printed.
        hub: its data set (`pairs.files.read_source` reads it). elsewhere: where else its file is, in words.
        fields: that every record must have. read: a record -> its item.
        part: items -> None for the whole benchmark, else what they are.
        headline: the row and the column that stand for the whole. rule: the official rule, in words.
        commit: of the hub data set, that is read where nobody asks for another; "main" where none is known here.
    """

    name: str
    title: str
    hub: str
    elsewhere: str
    fields: tuple[str, ...]
    read: Callable[[Record], AnyItem]
    part: Callable[[Sequence[AnyItem]], str | None]
    headline: tuple[str, str]
    rule: str
    commit: str = "main"


@dataclass(frozen=True, slots=True)
class Loaded:
    """A benchmark's items and where they are from. `sha256`: of the items as read, before any part was drawn.
    `foreign`: whether a part was drawn of items that are not the benchmark's."""

    benchmark: AssistantBenchmark
    items: tuple[AnyItem, ...]
    source: str
    sha256: str
    drawn: bool = False
    foreign: bool = False

    @property
    def part(self) -> str | None:
        """None where this is a whole benchmark, else what it is, in words."""
        return f"{FOREIGN}: {len(self.items)} drawn of others" if self.foreign else self.benchmark.part(self.items)


def _ifeval_part(items: Sequence[AnyItem]) -> str | None:
    return ifeval.part_of([item.instructions for item in items if isinstance(item, IfevalItem)])


def _infobench_part(items: Sequence[AnyItem]) -> str | None:
    return infobench.part_of(len(items), sum(len(item.questions) for item in items if isinstance(item, InfobenchItem)))


IFEVAL = AssistantBenchmark(
    name="ifeval",
    title="IFEval",
    hub="google/IFEval:train",
    elsewhere="data/input_data.jsonl of google-research's instruction_following_eval",
    fields=("key", "prompt", "instruction_id_list", "kwargs"),
    read=ifeval.read_item,
    part=_ifeval_part,
    headline=(ifeval.PROMPT_LEVEL, ifeval.STRICT),
    rule="an instruction is followed where its checker says so of the response (strict), or of one of its eight "
    "variants (loose); a prompt where all of its instructions are; an empty response follows nothing",
    commit="966cd89545d6b6acfd7638bc708b98261ca58e84",
)
INFOBENCH = AssistantBenchmark(
    name="infobench",
    title="InFoBench",
    hub="kqsong/InFoBench",
    elsewhere="the data set of qinyiwei/InfoBench as JSON lines",
    fields=("id", "input", "instruction", "decomposed_questions", "subset"),
    read=infobench.read_item,
    part=_infobench_part,
    headline=(infobench.DRFR, infobench.OFFICIAL),
    rule="share of yes among all answers; an answer that can't be read counts as no and ends its instruction, whose "
    "later questions are not asked and not counted (column official). Column all questions: those count as no too",
)
BENCHMARKS: Mapping[str, AssistantBenchmark] = {one.name: one for one in (IFEVAL, INFOBENCH)}


def named(name: str) -> AssistantBenchmark | None:
    """The benchmark of a name, in any case; None where there is none.

    >>> named("IFEval").title, named("rewardbench")
    ('IFEval', None)
    """
    return BENCHMARKS.get(folded(name))


def chosen(
    on: str = "",
    data: Path | None = None,
    revisions: Mapping[str, str] | None = None,
    offline: bool = False,
    count: int | None = None,
    seed: int = 1,
) -> list[Loaded]:
    """The benchmarks that are asked for, whole or in part.

    Args:
        on: names with commas between; none: all that `data` holds, else all.
        data: a folder of files named as the benchmarks, or one file of the one benchmark in `on`.
        revisions: of hub data sets, by name.
        count: items of each, drawn with `seed`.

    Raises:
        UserError: an unknown name, a folder without files of a benchmark, items that can't be read.
    """
    names = []
    for name in filter(None, (part.strip() for part in on.split(","))):
        found = named(name)
        if found is None:
            hint = nearest(folded(name), BENCHMARKS)
            raise UserError(f"{name!r} is no benchmark of assistant models; those are {', '.join(BENCHMARKS)}.{hint}")
        names.append(found.name)
    names = list(dict.fromkeys(names))
    if data is None:
        files: dict[str, list[Path]] = {name: [] for name in names or BENCHMARKS}
    elif data.is_file():
        if len(names) != 1:
            raise UserError(f"{data} is one file, and --on names {len(names)} benchmarks; name the one it is of")
        files = {names[0]: [data]}
    else:
        there = files_in(data)
        missing = [name for name in names if name not in there] or ([] if there else list(BENCHMARKS))
        if missing:
            raise UserError(f"{data} holds no file of {missing[0]}: none in it has a name that begins with it")
        files = {name: there[name] for name in names or there}
    revisions = revisions or {}
    loaded = [
        load(BENCHMARKS[name], found, revision=revisions.get(name), offline=offline) for name, found in files.items()
    ]
    return loaded if count is None else [part(one, count, seed) for one in loaded]


def files_in(data: Path) -> dict[str, list[Path]]:
    """Benchmark -> its data files in a folder.

    Raises:
        UserError: there is no such folder.
    """
    if not data.is_dir():
        raise UserError(f"no folder {data}; give the folder that holds the benchmarks' files, or one file")
    found: dict[str, list[Path]] = {}
    for entry in sorted(data.iterdir()):
        name = next((name for name in BENCHMARKS if folded(entry.name).startswith(name)), None)
        if name is not None:
            files = sorted(entry.rglob("*")) if entry.is_dir() else [entry]
            found.setdefault(name, []).extend(file for file in files if is_data(file))
    return {name: found[name] for name in BENCHMARKS if found.get(name)}


def load(
    benchmark: AssistantBenchmark, files: Sequence[Path] = (), revision: str | None = None, offline: bool = False
) -> Loaded:
    """All items of a benchmark, from files, or from the hub where none are given.

    Raises:
        UserError: a file that can't be read or is of another schema (which fields are missing, on which line), an item
            that is there twice, the hub out of reach.
    """
    revision = revision or benchmark.commit
    items: list[AnyItem] = []
    seen: set[str] = set()
    where = []
    for source in [str(file) for file in files] or [benchmark.hub]:
        try:
            read = read_source(source, revision=revision, offline=offline)
        except UserError as error:
            hint = "" if files else f"; or give {benchmark.elsewhere} with --data FILE"
            raise UserError(f"{error}{hint}") from None
        where.append(source if files else f"{source.partition(':')[0]} at {read.commit or revision}")
        for row in read.rows:
            record = Record(source, row.number, row.value if isinstance(row.value, dict) else {})
            record.need(benchmark.fields, benchmark.title)
            item = benchmark.read(record)
            if item.id in seen:
                raise record.wrong(f"item {item.id[:60]!r} is there a second time; give each item once")
            seen.add(item.id)
            items.append(item)
    return Loaded(benchmark, tuple(items), ", ".join(where), _sha256(items))


def part(loaded: Loaded, count: int, seed: int) -> Loaded:
    """At most `count` items, drawn with a seed, of each subset as many as its share. Order stays."""
    if count >= len(loaded.items):
        return loaded
    foreign = (loaded.part or "").startswith(FOREIGN)
    sizes = Counter(item.subset for item in loaded.items)
    rng = random.Random(f"{seed} {loaded.benchmark.name}")
    kept: set[str] = set()
    for subset, wanted in shared_out(sizes, count).items():
        ids = sorted(item.id for item in loaded.items if item.subset == subset)
        rng.shuffle(ids)
        kept.update(ids[:wanted])
    return replace(loaded, items=tuple(item for item in loaded.items if item.id in kept), drawn=True, foreign=foreign)


def _sha256(items: Sequence[AnyItem]) -> str:
    digest = hashlib.sha256()
    for item in items:
        row = {key: value for key, value in asdict(item).items() if key != "place"}
        digest.update(json.dumps(row, ensure_ascii=True, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()
