"""The verbs `audit` and `compare`. Heavy imports inside, as in `cli.py`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

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
    Pairs,
    Parallel,
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

QUICK_PAIRS, QUICK_VOTES = 50, 2
AUDIT, COMPARISON = "audit.json", "compare.json"
"""The files by which the verbs know folders of their own."""
EXAMPLE = """Example:

\b
  patarm-lite train smoke --force
  patarm-lite export runs/smoke-seed1 -o my-judge --force
  """
JUDGE = "my-judge/smoke-seed1-q8_0.gguf"
PAIRS = "--pairs runs/smoke-seed1/heldout.jsonl"


def add(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    other = JUDGE.replace("q8_0", "q4_k_m")
    app.command(epilog=f"{EXAMPLE}patarm-lite audit {JUDGE} {PAIRS} --quick")(audit)
    app.command(epilog=f"{EXAMPLE}patarm-lite compare {JUDGE} {other} {PAIRS} --n 20")(compare)


def audit(
    judge: JudgeName,
    pairs: Pairs = None,
    count: Count = None,
    votes: Votes = 4,
    attacks: Annotated[
        int | None, typer.Option(min=0, help="Cases of each family of attacks; none: 40.", show_default=False)
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="50 pairs, 2 votes, 10 attacks at most.")] = False,
    out: Out = None,
    seed: Seed = 1,
    decoding: Decoding = None,
    max_tokens: MaxTokens = 1024,
    long: Long = "error",
    context: Context = None,
    threads: Threads = None,
    parallel: Parallel = None,
    tokenizer: Tokenizer = None,
    store: StoreOption = None,
    no_store: NoStore = False,
    as_json: AsJson = False,
    force: Force = False,
    offline: Offline = False,
) -> None:
    """Look for a judge's flaws on pairs: biases, saturation, calibration, noise, attacks.

    Without --pairs a judge of the arena is audited on the arena. JUDGE comes before --pairs.
    """
    prepare(out, AUDIT, force, offline, store, no_store)
    check_tokenizer(tokenizer, judge)
    from patarm_lite.evals.audit_attacks import CASES, QUICK
    from patarm_lite.evals.audit_page import audit_page
    from patarm_lite.evals.audit_run import audit_judge, sentences
    from patarm_lite.evals.named_judge import Asking, named_judge
    from patarm_lite.evals.pair_choice import chosen_pairs
    from patarm_lite.store import Store

    attacks = (QUICK if quick else CASES) if attacks is None else attacks
    if quick:
        count, votes, attacks = min(count or QUICK_PAIRS, QUICK_PAIRS), min(votes, QUICK_VOTES), min(attacks, QUICK)
    asking = Asking(
        votes, "both", seed, max_tokens, decoding, long, context, threads, parallel, tokenizer, offline=offline
    )
    chosen = None if pairs is None else chosen_pairs(pairs, count, seed, offline)
    named = named_judge(judge, asking)
    with Store.open(store_place(store, no_store)) as opened:
        found = audit_judge(
            named,
            chosen,
            opened,
            votes=votes,
            attacks=attacks,
            seed=seed,
            count=count,
            source=", ".join(pairs or []),
        )
    _put(found, sentences(found), AUDIT, audit_page, out, force, as_json)


def compare(
    judges: Annotated[list[str], typer.Argument(metavar="A B...", help="Judges, or folders that bench -o wrote.")],
    pairs: Pairs = None,
    on: Names = "",
    data: Data = None,
    count: Count = None,
    votes: Votes = 1,
    out: Out = None,
    seed: Seed = 1,
    decoding: Decoding = None,
    max_tokens: MaxTokens = 1024,
    long: Long = "error",
    context: Context = None,
    threads: Threads = None,
    parallel: Parallel = None,
    tokenizer: Tokenizer = None,
    store: StoreOption = None,
    no_store: NoStore = False,
    as_json: AsJson = False,
    force: Force = False,
    offline: Offline = False,
) -> None:
    """Compare judges with the first one, on the same pairs or benchmarks.

    Judges come before --pairs. Finished bench folders need neither.
    """
    if len(set(judges)) < 2 or len(set(judges)) < len(judges):
        raise UserError(f"{len(set(judges))} different judges are named; compare two or more, each named once")
    prepare(out, COMPARISON, force, offline, store, no_store)
    folders = _finished(judges, pairs is not None or bool(on) or data is not None)
    if not folders and (pairs is None) == (not on and data is None):
        raise UserError(
            "judges are compared on pairs or on benchmarks; give --pairs FILE, or --on NAME with --data DIR"
        )
    check_tokenizer(tokenizer, *judges)
    from patarm_lite.evals.audit_page import compare_page
    from patarm_lite.evals.bench_choice import chosen_benchmarks
    from patarm_lite.evals.compare import markdown
    from patarm_lite.evals.compare_run import compare_folders, compare_on_benchmarks, compare_on_pairs
    from patarm_lite.evals.named_judge import Asking, named_judge
    from patarm_lite.evals.pair_choice import chosen_pairs
    from patarm_lite.store import Store

    asking = Asking(
        votes, "both", seed, max_tokens, decoding, long, context, threads, parallel, tokenizer, offline=offline
    )
    if folders:
        found = compare_folders(folders, seed)
    else:
        chosen = None if pairs is None else chosen_pairs(pairs, count, seed, offline)
        loaded = [] if pairs is not None else chosen_benchmarks(on, data, [], offline, count, seed)
        named = [named_judge(place, asking) for place in judges]
        with Store.open(store_place(store, no_store)) as opened:
            if chosen is not None:
                found = compare_on_pairs(named, chosen, opened, votes=votes, seed=seed)
            else:
                found = compare_on_benchmarks(named, loaded, opened, votes=votes, seed=seed)
    _put(found, markdown(found), COMPARISON, compare_page, out, force, as_json)


def _finished(judges: Sequence[str], items_named: bool) -> list[Path]:
    """The judges as folders of `bench`, where they are such; else none."""
    finished = [(Path(place) / "bench.json").is_file() for place in judges]
    if any(finished) and not all(finished):
        raise UserError(f"{judges[finished.index(False)]} is no folder of bench, and another one is; give one kind")
    if all(finished) and items_named:
        raise UserError("folders of bench hold their items; leave out --pairs, --on and --data")
    return [Path(place) for place in judges] if all(finished) else []


def _put(
    found: Mapping[str, Any],
    text: str,
    mark: str,
    page: Callable[[Mapping[str, Any]], str],
    out: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write the folder with the JSON and its page, and print the words, or the JSON."""
    whole = json.dumps(found, indent=2, ensure_ascii=False)
    name = str(Path(mark).with_suffix(".html"))
    if out is not None:
        write_result_folder(out, {mark: f"{whole}\n", name: page(found)}, mark, force)
    typer.echo(whole if as_json else text)
    if out is not None:
        typer.echo(f"next: open {shlex.quote(str(out / name))}", err=True)
