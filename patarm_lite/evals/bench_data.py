"""The benchmarks by name, and their items: from local files or from the hub, whole or a seeded part.

A folder of data is searched by name: a file or folder in it belongs to the benchmark whose name its own begins with
(`RM-Bench`, `rmbench.jsonl`, `judgebench/gpt4o.jsonl.gz`; the longest name wins), and a folder brings every data file
in it.

From the hub a benchmark is read at `Benchmark.commit`, or at `--revision NAME=COMMIT`; a branch is resolved to its
commit first, all splits are read at that commit, and every table names it. What was read is told apart by the SHA-256
of its items too, whatever file they came from.

Nothing here goes through `pairs.load_pairs`: that drops duplicates and empty responses, and an official score counts
them.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from patarm_lite.errors import UserError, missing_extra, nearest
from patarm_lite.evals.hhh import HHH
from patarm_lite.evals.items import FOREIGN, BenchItem, Benchmark, Record, folded, part_of
from patarm_lite.evals.judgebench import JUDGEBENCH
from patarm_lite.evals.llmbar import LLMBAR
from patarm_lite.evals.pandalm import PANDALM
from patarm_lite.evals.rewardbench import REWARDBENCH
from patarm_lite.evals.rewardbench2 import REWARDBENCH2
from patarm_lite.evals.rm_bench import RM_BENCH
from patarm_lite.pairs.files import FORMATS, read_rows

BENCHMARKS: Mapping[str, Benchmark] = {
    benchmark.name: benchmark for benchmark in (REWARDBENCH, REWARDBENCH2, RM_BENCH, JUDGEBENCH, LLMBAR, PANDALM, HHH)
}

OF_ASSISTANTS = ("ifeval", "infobench")
"""Benchmarks of `bench-model`, which score what writes responses and not what judges them."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A benchmark's items and where they are from. `sha256`: of the items as read, before any part was drawn.
    `foreign`: whether a part was drawn of items that are not the benchmark's."""

    benchmark: Benchmark
    items: tuple[BenchItem, ...]
    source: str
    sha256: str
    drawn: bool = False
    foreign: bool = False

    @property
    def part(self) -> str | None:
        """None where this is a whole benchmark, else what it is, in words."""
        return f"{FOREIGN}: {len(self.items)} drawn of others" if self.foreign else part_of(self.benchmark, self.items)


def benchmark_named(name: str) -> Benchmark:
    """The benchmark of a name.

    Raises:
        UserError: there is none of that name.

    >>> benchmark_named("RM-Bench").title
    'RM-Bench'
    """
    known = {folded(found): found for found in BENCHMARKS}
    if folded(name) in OF_ASSISTANTS:
        raise UserError(
            f"{name} scores assistant models, not judges; type: patarm-lite bench-model MODEL --on {folded(name)}"
        )
    if folded(name) not in known:
        raise UserError(
            f"benchmark {name!r} is not one of {', '.join(BENCHMARKS)} "
            f"(of assistant models: {', '.join(OF_ASSISTANTS)})." + nearest(name, [*BENCHMARKS, *OF_ASSISTANTS])
        )
    return BENCHMARKS[known[folded(name)]]


def load(
    benchmark: Benchmark, files: Sequence[Path] = (), revision: str | None = None, offline: bool = False
) -> Loaded:
    """All items of a benchmark, from files, or from the hub where none are given.

    Args:
        revision: of the hub's data set; None: `benchmark.commit`.

    Raises:
        UserError: a file that can't be read or is of another schema (which fields are missing, on which line), the hub
            out of reach, or a benchmark that is not there.
    """
    revision = revision or benchmark.commit
    if files:
        sources, where = [str(file) for file in files], ", ".join(str(file) for file in files)
    else:
        if not benchmark.hub:
            raise UserError(
                f"{benchmark.title} is not on the hub; fetch {benchmark.elsewhere} and give its folder with --data DIR"
            )
        revision = _commit(benchmark, revision, offline)
        sources, where = list(benchmark.hub), f"{_repository(benchmark)} at {revision}"
    items = []
    for source in sources:
        for row in read_rows(source, revision=revision, offline=offline):
            record = Record(source, row.number, row.value if isinstance(row.value, dict) else {})
            record.need(benchmark.fields, benchmark.title)
            items.append(benchmark.read(record))
    items = numbered(items)
    return Loaded(benchmark, tuple(items), where, _sha256(items))


def numbered(items: Sequence[BenchItem]) -> list[BenchItem]:
    """The items with ids that differ: the second of an id gets `#2`.

    >>> [item.id for item in numbered([BenchItem("a", ""), BenchItem("b", ""), BenchItem("a", "")])]
    ['a', 'b', 'a#2']
    """
    seen: Counter[str] = Counter()
    found = []
    for item in items:
        seen[item.id] += 1
        found.append(item if seen[item.id] == 1 else replace(item, id=f"{item.id}#{seen[item.id]}"))
    return found


def files_in(data: Path) -> dict[str, list[Path]]:
    """Benchmark -> its data files in a folder.

    Raises:
        UserError: there is no such folder.
    """
    if not data.is_dir():
        what = "a file" if data.exists() else "not found"
        raise UserError(f"the folder of data {data} is {what}; give the folder that holds the benchmarks' files")
    found: dict[str, list[Path]] = {}
    for entry in sorted(data.iterdir()):
        name = _benchmark_of(entry.name)
        if name is not None:
            files = sorted(file for file in entry.rglob("*") if is_data(file)) if entry.is_dir() else [entry]
            found.setdefault(name, []).extend(file for file in files if is_data(file))
    return {name: found[name] for name in BENCHMARKS if found.get(name)}


def _benchmark_of(name: str) -> str | None:
    word = folded(name)
    fitting = [
        (len(start), benchmark.name)
        for benchmark in BENCHMARKS.values()
        for start in benchmark.names
        if word.startswith(start)
    ]
    return max(fitting)[1] if fitting else None


def is_data(file: Path) -> bool:
    """Whether a file's name says that it holds records."""
    return file.is_file() and Path(file.name.lower().removesuffix(".gz")).suffix in FORMATS


def part(loaded: Loaded, count: int, seed: int) -> Loaded:
    """At most `count` items, drawn with a seed: of each subset as many as its share, at least one where there is room.

    Items of one group stay together, so that there may be a few more. Order stays.

    Raises:
        UserError: `count` is not a number of items.
    """
    if count < 1:
        raise UserError(f"--n {count} is not a number of items; give at least 1")
    if count >= len(loaded.items):
        return loaded
    foreign = (part_of(loaded.benchmark, loaded.items) or "").startswith(FOREIGN)
    groups: dict[str, dict[str, list[BenchItem]]] = {}
    for item in loaded.items:
        groups.setdefault(item.subset, {}).setdefault(item.group or item.id, []).append(item)
    sizes = {subset: sum(map(len, found.values())) for subset, found in groups.items()}
    rng = random.Random(f"{seed} {loaded.benchmark.name}")
    kept: set[str] = set()
    for subset, wanted in shared_out(sizes, count).items():
        order = sorted(groups[subset])
        rng.shuffle(order)
        taken = 0
        for name in order:
            if taken >= wanted:
                break
            kept |= {item.id for item in groups[subset][name]}
            taken += len(groups[subset][name])
    return replace(loaded, items=tuple(item for item in loaded.items if item.id in kept), drawn=True, foreign=foreign)


def shared_out(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """`count` shared out by size, each at least one as long as there is room: the largest remainders get what is left.

    >>> shared_out({"a": 70, "b": 29, "c": 1}, 10)
    {'a': 7, 'b': 2, 'c': 1}
    """
    order = sorted(sizes, key=lambda name: (-sizes[name], name))
    found = {name: int(number < count) for number, name in enumerate(order)}
    total = sum(sizes.values())
    exact = {name: count * size / total for name, size in sizes.items()}
    while sum(found.values()) < count:
        name = max((name for name in order if found[name] < sizes[name]), key=lambda name: exact[name] - found[name])
        found[name] += 1
    return {name: found[name] for name in sizes}


def _sha256(items: Sequence[BenchItem]) -> str:
    digest = hashlib.sha256()
    for item in items:
        turns = [[turn.role, turn.content] for turn in item.prompt]
        row = [item.id, item.subset, item.label, item.correct, turns, list(item.responses)]
        digest.update(json.dumps(row, ensure_ascii=True).encode() + b"\n")
    return digest.hexdigest()


def _repository(benchmark: Benchmark) -> str:
    return benchmark.hub[0].partition(":")[0].partition("@")[0]


def _commit(benchmark: Benchmark, revision: str, offline: bool) -> str:
    """The commit that a revision of the hub's data set is at. Offline the revision itself, which then names a file in
    the cache or nothing."""
    if offline:
        return revision
    try:
        from huggingface_hub import HfApi, errors
    except ImportError:
        raise missing_extra("train", "huggingface_hub") from None
    name = _repository(benchmark)
    lost: type[Exception] = getattr(errors, "HTTPError", OSError)  # of the HTTP library that the hub's client uses
    try:
        return str(HfApi().dataset_info(name, revision=revision).sha)
    except errors.OfflineModeIsEnabled:
        return revision
    except (errors.HfHubHTTPError, lost, OSError, ValueError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"hub data set {name} (revision {revision}) can't be read: {line}; or give local files with --data DIR"
        ) from None
