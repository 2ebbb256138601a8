"""Which benchmarks a command means, and from where: names, local files, commits of the hub, a part of the items."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from patarm_lite.errors import UserError
from patarm_lite.evals.bench_data import BENCHMARKS, Loaded, benchmark_named, files_in, load, part


def chosen_benchmarks(
    on: str = "",
    data: Path | None = None,
    revisions: Sequence[str] = (),
    offline: bool = False,
    count: int | None = None,
    seed: int = 1,
) -> list[Loaded]:
    """The benchmarks that are asked for, whole or in part.

    Args:
        on: names with commas between; none: all that `data` holds, else all of the hub.
        data: a folder of files named as the benchmarks, or one file of the one benchmark in `on`.
        revisions: NAME=COMMIT of hub data sets.
        count: items of each, drawn with `seed`.

    Raises:
        UserError: an unknown name, a folder without files of a benchmark, items that can't be read.
    """
    names = list(dict.fromkeys(benchmark_named(name.strip()).name for name in on.split(",") if name.strip()))
    at = dict(_revision(given) for given in revisions)
    found: dict[str, list[Path]]
    if data is None:
        found = {name: [] for name in names or [name for name in BENCHMARKS if BENCHMARKS[name].hub]}
    elif data.is_file():
        if len(names) != 1:
            raise UserError(f"{data} is one file, and --on names {len(names)} benchmarks; name the one it is of")
        found = {names[0]: [data]}
    else:
        there = files_in(data)
        missing = [name for name in names if name not in there]
        if missing or not there:
            what = BENCHMARKS[missing[0]].title if missing else "any benchmark"
            begins = BENCHMARKS[missing[0]].names[0] if missing else "rewardbench, llmbar, ..."
            raise UserError(f"{data} holds no file of {what}: none in it has a name that begins with {begins}")
        found = {name: there[name] for name in names or there}
    loaded = [load(BENCHMARKS[name], files, revision=at.get(name), offline=offline) for name, files in found.items()]
    return loaded if count is None else [part(one, count, seed) for one in loaded]


def _revision(given: str) -> tuple[str, str]:
    name, found, commit = given.partition("=")
    if not found or not commit:
        raise UserError(f"--revision {given!r} is not NAME=COMMIT, e.g. --revision judgebench=main")
    return benchmark_named(name).name, commit
