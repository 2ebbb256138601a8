"""Options that several verbs share, each with one meaning and one sentence of help. No heavy imports."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from patarm_lite.errors import UserError
from patarm_lite.result_folder import check_result_folder

JudgeName = Annotated[str, typer.Argument(metavar="JUDGE", help="A GGUF judge, a folder, a hub id or a server's URL.")]
Pairs = Annotated[
    list[str] | None, typer.Option("--pairs", metavar="FILE...", help="Pair files, or a run's heldout.jsonl.")
]
Names = Annotated[str, typer.Option("--on", metavar="NAME,...", help="Which; none: all that --data holds.")]
Data = Annotated[Path | None, typer.Option(metavar="DIR", help="Local files of benchmarks; none: from the hub.")]
Revision = Annotated[
    list[str] | None, typer.Option("--revision", metavar="NAME=COMMIT", help="Of a hub data set; else ours or newest.")
]
Count = Annotated[int | None, typer.Option("--n", min=1, help="So many, drawn; none: all.")]
Votes = Annotated[int, typer.Option("--k", "--votes", min=1, max=1024, help="Votes a response, each its seed.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything drawn.")]
Decoding = Annotated[
    str | None, typer.Option(help="constrained or free; none: constrained where it can be.", show_default=False)
]
MaxTokens = Annotated[int, typer.Option(min=1, help="Tokens of one judgement at most.")]
Long = Annotated[str, typer.Option(help="A prompt that is too long: error (no score), or cut the middle.")]
Context = Annotated[
    int | None, typer.Option(min=1, help="Tokens of a prompt and its judgement; none: 4096.", show_default=False)
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; none: physical cores.")]
Parallel = Annotated[
    int | None, typer.Option(min=1, help="Votes written at once; none: 32, with a URL 8.", show_default=False)
]
Tokenizer = Annotated[Path | None, typer.Option(metavar="FILE", help="With a URL: its GGUF or tokenizer.json.")]
StoreOption = Annotated[Path | None, typer.Option("--store", metavar="FILE", help="Where votes are kept, in clear.")]
NoStore = Annotated[bool, typer.Option("--no-store", help="Keep no votes; a stopped run begins anew.")]
Out = Annotated[Path | None, typer.Option("-o", "--out", metavar="DIR", help="Folder for the page and the JSON.")]
Offline = Annotated[bool, typer.Option("--offline", help="Touch no network; a hub id must be in the cache.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]


def prepare(out: Path | None, mark: str, force: bool, offline: bool, store: Path | None, no_store: bool) -> None:
    """What is refused before any work: a store that is and is not wanted, an output that is in the way.

    Args:
        mark: the file by which the verb knows a folder of its own.
    """
    if offline:
        go_offline()
    if no_store and store is not None:
        raise UserError("--store and --no-store can't both hold; leave out one")
    if out is not None:
        check_result_folder(out, mark, force)


def store_place(store: Path | None, no_store: bool) -> Path | None:
    """Where votes are kept; None: nowhere."""
    from patarm_lite.store import default_place

    return None if no_store else store or default_place()


def check_tokenizer(tokenizer: Path | None, *judges: str | None) -> None:
    """Refuse a tokenizer where no judge is a server."""
    from patarm_lite.evals.named_judge import is_url

    if tokenizer is not None and not any(is_url(judge or "") for judge in judges):
        raise UserError(f"--tokenizer is for servers, and {judges[0]} is no URL; leave it out")


def go_offline() -> None:
    """Tell every library that may reach out not to."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ[name] = "1"
