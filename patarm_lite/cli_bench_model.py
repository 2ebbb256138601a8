"""The verb that measures assistant models: `bench-model`. Heavy imports inside, as in `cli.py`."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from patarm_lite.cli_options import (
    AsJson,
    Count,
    Data,
    Force,
    Names,
    NoStore,
    Offline,
    Out,
    Seed,
    Threads,
    prepare,
    store_place,
)
from patarm_lite.errors import UserError
from patarm_lite.result_folder import write_result_folder

if TYPE_CHECKING:
    from patarm_lite.evals.bench_model import Scored

MARK = "bench-model.json"
"""The file by which the verb knows a folder of its own."""
EVALUATOR_KEY = "PATARM_EVALUATOR_API_KEY"

Evaluator = Annotated[
    str | None, typer.Option(metavar="MODEL", help="Answers InFoBench's questions: file, folder, hub id or URL.")
]
Revisions = Annotated[
    list[str] | None,
    typer.Option("--revision", metavar="NAME=COMMIT", help="Of ifeval, infobench, model or evaluator on the hub."),
]
StoreFile = Annotated[Path | None, typer.Option("--store", metavar="FILE", help="Where replies are kept, in clear.")]


def add(app: typer.Typer) -> None:
    """Put the verb on the command line."""
    app.command(
        name="bench-model",
        epilog="""bench score ifeval --verdicts FILE --data FILE scores stored responses.

Example:

\b
  patarm-lite train smoke --force
  patarm-lite export runs/smoke-seed1 -o my-model --force
  echo '{"key": 1, "prompt": "Say hi without commas.", "instruction_id_list": ["punctuation:no_comma"],
  "kwargs": [{}]}' > ifeval.json
  patarm-lite bench-model my-model/smoke-seed1-q8_0.gguf --on ifeval --data ifeval.json --max-tokens 40""",
    )(bench_model)


def bench_model(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A GGUF file, a folder, a hub id or a server's URL.")],
    on: Names = "",
    data: Data = None,
    count: Count = None,
    evaluator: Evaluator = None,
    out: Out = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a response at most.")] = 2048,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.0,
    seed: Seed = 1,
    evaluator_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one answer of the evaluator.")] = 64,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a chat and its reply; none: 8192.", show_default=False)
    ] = None,
    threads: Threads = None,
    parallel: Annotated[
        int | None, typer.Option(min=1, help="Replies written at once; none: 32, else 8.", show_default=False)
    ] = None,
    revision: Revisions = None,
    store: StoreFile = None,
    no_store: NoStore = False,
    as_json: AsJson = False,
    force: Force = False,
    offline: Offline = False,
) -> None:
    """Run an assistant model on IFEval and InFoBench.

    Names: ifeval, infobench (which needs --evaluator). A run that was stopped goes on with the same command.
    """
    prepare(out, MARK, force, offline, store, no_store)
    from patarm_lite.evals.assistant import Drawing
    from patarm_lite.evals.assistant_data import BENCHMARKS, chosen
    from patarm_lite.evals.bench_model import named_model, run
    from patarm_lite.evals.model_page import markdown
    from patarm_lite.evals.named_judge import KEY
    from patarm_lite.store import Store

    at = _revisions(revision or [], [*BENCHMARKS, "model", "evaluator"])
    benchmarks = chosen(on, data, at, offline, count, seed)
    if evaluator is not None and all(loaded.benchmark.name != "infobench" for loaded in benchmarks):
        raise UserError("--evaluator answers InFoBench's questions, and InFoBench is not asked for; leave it out")
    settings: dict[str, Any] = {"threads": threads, "context": context, "parallel": parallel, "offline": offline}
    key = os.environ.get(KEY) or None
    named = named_model(model, key=key, revision=at.get("model", "main"), **settings)
    other = None
    if evaluator is not None:
        own = os.environ.get(EVALUATOR_KEY) or (key if _same_server(model, evaluator) else None)
        other = named_model(evaluator, key=own, revision=at.get("evaluator", "main"), **settings)
    with Store.open(store_place(store, no_store)) as opened:
        drawing = Drawing(max_tokens, temperature, seed)
        found, scored = run(named, other, benchmarks, drawing, opened, seed, evaluator_tokens)
    if out is not None:
        write_result_folder(out, _files(found, scored), MARK, force)
    if as_json:
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
    elif out is not None:
        typer.echo(out)
        typer.echo(f"next: open {shlex.quote(str(out / 'bench-model.html'))}", err=True)
    else:
        typer.echo(markdown(found).rstrip("\n"))


def _files(found: dict[str, Any], scored: list[Scored]) -> dict[str, str]:
    """The files of the folder: name -> text."""
    from patarm_lite.evals.bench_model import rows_of
    from patarm_lite.evals.model_page import markdown, page

    files = {
        MARK: json.dumps(found, indent=2, ensure_ascii=False) + "\n",
        "bench-model.md": markdown(found),
        "bench-model.html": page(found),
    }
    for one in scored:
        rows = rows_of(one, found["model"])
        files[f"responses-{one.loaded.benchmark.name}.jsonl"] = "".join(json.dumps(row) + "\n" for row in rows)
    return files


def _revisions(given: list[str], names: list[str]) -> dict[str, str]:
    found = {}
    for one in given:
        name, sign, commit = one.partition("=")
        if not sign or not commit or name not in names:
            raise UserError(f"--revision {one!r} is not NAME=COMMIT, where NAME is one of {', '.join(names)}")
        found[name] = commit
    return found


def _same_server(model: str, evaluator: str) -> bool:
    """Whether a key for the one may be shown to the other."""
    first, second = urlsplit(model), urlsplit(evaluator)
    return bool(first.scheme) and (first.scheme, first.netloc) == (second.scheme, second.netloc)
