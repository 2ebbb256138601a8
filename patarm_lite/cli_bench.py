"""The verbs that measure judges: `bench` and `bench score`. Heavy imports inside, as in `cli.py`."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from patarm_lite.cli_options import (
    AsJson,
    Context,
    Count,
    Data,
    Decoding,
    Force,
    JudgeName,
    Long,
    MaxTokens,
    Names,
    NoStore,
    Offline,
    Out,
    Parallel,
    Revision,
    Seed,
    StoreOption,
    Threads,
    Tokenizer,
    Votes,
    check_tokenizer,
    prepare,
    store_place,
)
from patarm_lite.errors import UserError
from patarm_lite.result_folder import write_result_folder

if TYPE_CHECKING:
    from patarm_lite.evals.assistant_data import AssistantBenchmark
    from patarm_lite.evals.bench import Outcome
    from patarm_lite.evals.bench_data import Loaded

RUN = "run"
MARK = "bench.json"
"""The file by which bench knows a folder of its own."""


class _WithDefault(typer.core.TyperGroup):
    """A group whose first word need not be a verb: `bench JUDGE` is `bench run JUDGE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        self.add_help_option = False
        known = bool(args) and args[0] in self.commands
        return super().parse_args(ctx, args if known else [RUN, *args])


bench_app = typer.Typer(
    cls=_WithDefault,
    rich_markup_mode=None,
    help="Run a judge on benchmarks; bench score: official figures of stored verdicts.",
)


def add(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    app.add_typer(bench_app, name="bench")


@bench_app.command(
    name=RUN,
    epilog="""bench score NAME --verdicts FILE scores stored verdicts.

Example:

\b
  patarm-lite train smoke --force
  patarm-lite export runs/smoke-seed1 -o my-judge --force
  echo '[{"input": "name a color", "output_1": "Red.", "output_2": "old stone", "label": 1}]' > llmbar-Natural.json
  patarm-lite bench my-judge/smoke-seed1-q8_0.gguf --on llmbar --data llmbar-Natural.json""",
)
def run(
    judge: JudgeName,
    on: Names = "",
    data: Data = None,
    count: Count = None,
    votes: Votes = 1,
    before: Annotated[str | None, typer.Option(metavar="JUDGE", help="Another judge on the same items.")] = None,
    out: Out = None,
    seed: Seed = 1,
    score: Annotated[str, typer.Option(help="sampled spares the expected scores; or both.")] = "both",
    decoding: Decoding = None,
    max_tokens: MaxTokens = 1024,
    long: Long = "error",
    context: Context = None,
    threads: Threads = None,
    parallel: Parallel = None,
    tokenizer: Tokenizer = None,
    deterministic: Annotated[bool, typer.Option("--deterministic", help="Equal input, equal bits; slower.")] = False,
    revision: Revision = None,
    store: StoreOption = None,
    no_store: NoStore = False,
    as_json: AsJson = False,
    force: Force = False,
    offline: Offline = False,
) -> None:
    """Run a judge on benchmarks: official scores with intervals.

    Names: rewardbench, rewardbench2, rm-bench, judgebench, llmbar, pandalm, hhh. A run that was stopped goes on with
    the same command.
    """
    prepare(out, MARK, force, offline, store, no_store)
    check_tokenizer(tokenizer, judge, before)
    from patarm_lite.evals.bench import judge_benchmarks
    from patarm_lite.evals.bench_choice import chosen_benchmarks
    from patarm_lite.evals.named_judge import Asking, named_judge
    from patarm_lite.evals.scoreboard import markdown, scoreboard
    from patarm_lite.store import Store

    asking = Asking(
        votes, score, seed, max_tokens, decoding, long, context, threads, parallel, tokenizer, deterministic, offline
    )
    benchmarks = chosen_benchmarks(on, data, revision or [], offline, count, seed)
    earlier, own = None if before is None else named_judge(before, asking), named_judge(judge, asking)
    with Store.open(store_place(store, no_store)) as opened:
        first = None if earlier is None else judge_benchmarks(earlier, benchmarks, opened, votes)
        second = judge_benchmarks(own, benchmarks, opened, votes)
    found = scoreboard(benchmarks, second, first, k=votes, seed=seed)
    if out is not None:
        write_result_folder(out, _files(found, benchmarks, second, first), MARK, force)
    if as_json:
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
    elif out is not None:
        typer.echo(out)
        typer.echo(f"next: open {shlex.quote(str(out / 'bench.html'))}", err=True)
    else:
        typer.echo(markdown(found).rstrip("\n"))


@bench_app.command(
    name="score",
    epilog="""Example:

\b
  echo '{"id": 1, "subset": "Natural", "label": 1, "scores": [8, 5]}' > verdicts.jsonl
  patarm-lite bench score llmbar --verdicts verdicts.jsonl""",
)
def score_verdicts(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A benchmark, such as judgebench.")],
    verdicts: Annotated[Path, typer.Option(metavar="FILE", help="One record an item: id, scores or decisions.")],
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The benchmark's files; then every item must be there once.")
    ] = None,
    unreadable: Annotated[
        float | None, typer.Option(metavar="NUMBER", help="A score that stands for an unreadable one, such as -1.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the intervals.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Print a benchmark's official figure from stored scores or decisions, of any judge.

    ifeval and infobench: of any assistant model, from its responses or what was found of them.
    """
    from patarm_lite.evals import assistant_data
    from patarm_lite.evals.bench_data import benchmark_named, files_in, load
    from patarm_lite.evals.items import part_of
    from patarm_lite.evals.scoreboard import figures, verdict_table
    from patarm_lite.evals.stored import read_answers

    of_assistants = assistant_data.named(name)
    benchmark = None if of_assistants else benchmark_named(name)
    if not verdicts.is_file():
        raise UserError(f"no file {verdicts}; give a file of verdicts, one record an item")
    if of_assistants is not None:
        _score_assistant(of_assistants, verdicts, data, unreadable, seed, as_json)
        return
    assert benchmark is not None
    items = None
    if data is not None:
        files = [data] if data.is_file() else files_in(data).get(benchmark.name)
        if not files:
            raise UserError(f"{data} holds no file of {benchmark.title}; name one {benchmark.names[0]}.jsonl")
        items = load(benchmark, files).items
    answers = read_answers(benchmark, verdicts, items, unreadable)
    part = part_of(benchmark, [answer.item for answer in answers])
    known = {"benchmark": benchmark.name, "title": benchmark.title, "part": part, "rule": benchmark.rule}
    found = {**known, "headline": benchmark.headline, **figures(benchmark, answers, seed)}
    typer.echo(json.dumps(found, indent=2, ensure_ascii=False) if as_json else verdict_table(found))


def _score_assistant(
    benchmark: AssistantBenchmark,
    verdicts: Path,
    data: Path | None,
    unreadable: float | None,
    seed: int,
    as_json: bool,
) -> None:
    """Print what stored responses or decisions of an assistant model are worth."""
    from patarm_lite.evals.assistant_stored import score_stored
    from patarm_lite.evals.model_page import score_text

    if unreadable is not None:
        raise UserError(f"--unreadable is for scores, and {benchmark.title} has none; leave it out")
    found = score_stored(benchmark, verdicts, data, seed)
    typer.echo(json.dumps(found, indent=2, ensure_ascii=False) if as_json else score_text(found))


def _files(found: dict[str, Any], benchmarks: list[Loaded], judge: Outcome, before: Outcome | None) -> dict[str, str]:
    """The files of the folder: name -> text."""
    from patarm_lite.evals.scoreboard import markdown, page
    from patarm_lite.evals.stored import rows_of

    files = {
        MARK: json.dumps(found, indent=2, ensure_ascii=False) + "\n",
        "bench.md": markdown(found),
        "bench.html": page(found),
    }
    for ending, outcome in (("", judge), *([("-before", before)] if before is not None else [])):
        for loaded in benchmarks:
            rows = rows_of(
                loaded.benchmark,
                outcome.answers(loaded, "score"),
                outcome.answers(loaded, "expected"),
                outcome.fingerprint,
            )
            files[f"verdicts-{loaded.benchmark.name}{ending}.jsonl"] = "".join(json.dumps(row) + "\n" for row in rows)
    return files
