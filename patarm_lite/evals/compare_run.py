"""Compare judges: each judges the same pairs or benchmarks, one after the other, and is held against the first.

from patarm_lite.evals.compare_run import compare_on_pairs
from patarm_lite.evals.named_judge import Asking, named_judge

judges = [named_judge(place, Asking()) for place in ("old.gguf", "new.gguf")]
with Store.open(None) as store:
    found = compare_on_pairs(judges, pairs, store, votes=1)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from patarm_lite.errors import UserError
from patarm_lite.evals.bench import judge_benchmarks
from patarm_lite.evals.bench_data import Loaded
from patarm_lite.evals.compare import compare_answers, compare_pairs, read_bench, rendered
from patarm_lite.evals.drawn import draw, judged_pairs, pair_part, say
from patarm_lite.evals.named_judge import NamedJudge
from patarm_lite.evals.pair_choice import check_enough
from patarm_lite.records import JudgedPair, Pair, Vote
from patarm_lite.store import Store


def compare_on_pairs(
    judges: Sequence[NamedJudge], pairs: Sequence[Pair], store: Store, *, votes: int, seed: int = 1
) -> dict[str, Any]:
    """Judges on pairs, as plain JSON values (see `compare.compare_pairs`). `left_out`: pairs that are too long for one.

    Raises:
        UserError: a judge that can't be loaded or can't go on, too few pairs that fit all. What was drawn is kept.
    """
    judged: list[tuple[str, list[JudgedPair | None]]] = []
    decoding = []
    for number, named in enumerate(judges, 1):
        say(f"judge {number} of {len(judges)}: each judges {len(pairs)} pairs, {votes} votes a response")
        with named.load() as judge:
            parts = [pair_part(judge, pairs, votes)]
            source = f"{len(pairs)} pairs"
            drawn = draw(judge, parts, store, name="compare", source=source, place=named.place, check=named.check)
            judged.append((named.place, judged_pairs(pairs, drawn.of(0))))
            decoding.append(judge.plan.decoding)
    by_all = [i for i in range(len(pairs)) if all(rows[i] is not None for _, rows in judged)]
    check_enough(len(by_all), len(pairs))
    found = compare_pairs([(p, [row for i in by_all if (row := rows[i]) is not None]) for p, rows in judged], seed)
    return rendered(found | {"left_out": len(pairs) - len(by_all)}, decoding)


def compare_on_benchmarks(
    judges: Sequence[NamedJudge], benchmarks: Sequence[Loaded], store: Store, *, votes: int, seed: int = 1
) -> dict[str, Any]:
    """Judges on benchmarks (see `compare.compare_answers`), with judgements of the items in which they disagree.

    Raises:
        UserError: a judge that can't be loaded or can't go on. What was drawn is kept.
    """
    outcomes = []
    for number, named in enumerate(judges, 1):
        say(f"judge {number} of {len(judges)}")
        outcomes.append(judge_benchmarks(named, benchmarks, store, votes))

    def judgements(judge: int, benchmark: str, item: str, place: int) -> Sequence[Vote] | None:
        return outcomes[judge].judgements((benchmark, item, place))

    answers = [(one.place, [(b.benchmark, one.answers(b, "score")) for b in benchmarks]) for one in outcomes]
    parts = {b.benchmark.name: b.part for b in benchmarks}
    return rendered(compare_answers(answers, seed, judgements, parts), [one.decoding for one in outcomes])


def compare_folders(folders: Sequence[Path], seed: int = 1) -> dict[str, Any]:
    """Folders that `bench -o` wrote, by the scores in them.

    Raises:
        UserError: a folder that can't be read, or of other items than the first.
    """
    read = [read_bench(folder) for folder in folders]
    for folder, other in zip(folders[1:], read[1:], strict=True):
        if other.items != read[0].items:
            raise UserError(
                f"{folder} and {folders[0]} are not of the same items; run bench on the same files for both"
            )
    answers = [(str(folder), one.answers) for folder, one in zip(folders, read, strict=True)]
    return rendered(compare_answers(answers, seed, parts=read[0].parts), [one.decoding for one in read])
