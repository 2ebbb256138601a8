"""What an export is asked for, what goes into it, and the folder it works in. Checked before any work begins."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patarm_lite import __version__
from patarm_lite.errors import UserError
from patarm_lite.metrics import row_to_pair
from patarm_lite.pairs import load_pairs
from patarm_lite.quantize.choice import prompt_bytes
from patarm_lite.quantize.four_bits import parts_of
from patarm_lite.quantize.source import Source
from patarm_lite.quantize.tensors import TensorFolder
from patarm_lite.recipe import Recipe
from patarm_lite.records import Pair
from patarm_lite.training.run_folder import read_lines, write_json

LADDER = ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "iq4_xs", "q3_k_m", "q2_k")
"""Types that `--auto` tries where none are given."""
DEFAULT_TYPES = ("q8_0", "q4_k_m")
HELD_IN = 64
"""Pairs whose judging makes the importance matrix."""
PROMPT_TOKENS, JUDGEMENT_TOKENS = 3072, 1024
"""Limits for a judge that no run folder describes."""
LEAST_JUDGEMENT_TOKENS = 128
"""A judgement may be this long whatever the run's limit was: constrained decoding needs room to close its lines."""


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line."""

    judge: str
    out: Path
    types: tuple[str, ...] = ()
    auto: bool = False
    max_loss: float = 0.01
    pairs: tuple[str, ...] = ()
    imatrix: str = "judging"
    fidelity: bool = True
    base: str | None = None
    revision: str = "main"
    offline: bool = False
    votes: int = 1
    seed: int = 1
    threads: int | None = None


def limits_of(recipe: Recipe | None) -> tuple[int, int]:
    """(tokens of a judging prompt, tokens of a judgement) at most."""
    if recipe is None:
        return PROMPT_TOKENS, JUDGEMENT_TOKENS
    return recipe.data.max_prompt_tokens, max(LEAST_JUDGEMENT_TOKENS, recipe.grpo.max_completion_tokens)


def ways_of(source: Source) -> tuple[str, ...]:
    """The ways an adapter can be merged: two where it was trained over 4-bit weights and the original is here."""
    if not source.adapter:
        return ()
    if parts_of(TensorFolder(source.weights)):
        return ("dequantized",)
    return ("original", "dequantized") if source.quantized_base else ("original",)


def pairs_of(request: Request, source: Source, recipe: Recipe | None) -> tuple[list[Pair], list[Pair]]:
    """(pairs for the importance matrix, held-out pairs for fidelity).

    A run folder knows both. With pair files and no run, a tenth of the prompts (by hash) makes the importance matrix
    and is not judged for fidelity.

    Raises:
        UserError: no pairs where the export needs some.
    """
    heldin: list[Pair] = []
    heldout = load_pairs(list(request.pairs), offline=request.offline).pairs if request.pairs else []
    if source.run is not None and recipe is not None:
        from patarm_lite.training.data import load_run_pairs

        own = [row_to_pair(row) for row in read_lines(source.run / "heldout.jsonl")]
        heldout = heldout if request.pairs else own
        away = {pair.prompt for pair in (*own, *heldout)}
        kept = [p for p in load_run_pairs(recipe, request.offline).train if p.prompt not in away]
        heldin = sorted(kept, key=_place)[:HELD_IN]
    if request.pairs and not heldin and request.imatrix == "judging":
        prompts = sorted({_place(pair) for pair in heldout})
        taken = set(prompts[: max(1, len(prompts) // 10)])
        heldin = [pair for pair in heldout if _place(pair) in taken][:HELD_IN]
        heldout = [pair for pair in heldout if _place(pair) not in taken]
    if request.fidelity and not heldout:
        raise UserError(
            f"{request.judge} brings no held-out pairs to prove the files on; give some with --pairs FILE, or export "
            "unproved with --without-fidelity"
        )
    if request.imatrix == "judging" and not heldin:
        raise UserError(
            f"{request.judge} brings no pairs to make an importance matrix of; give some with --pairs FILE, a matrix "
            "with --imatrix FILE, or --imatrix none"
        )
    return heldin, heldout


def _place(pair: Pair) -> str:
    """A stable place in no order, the same for all pairs of a prompt."""
    return hashlib.sha256(prompt_bytes(pair)).hexdigest()


def open_work(request: Request, types: Sequence[str], source: Source, force: bool) -> Path:
    """`OUT/.work` of this very request: a new one, or that of the same request which was stopped.

    Raises:
        UserError: OUT holds something else, a finished export, or one of another request.
    """
    out, work = request.out, request.out / ".work"
    identity = _identity(request, types, source)
    if out.exists() and not out.is_dir():
        raise UserError(f"output {out} is a file; choose a folder with -o")
    if out.is_dir() and any(out.iterdir()):
        finished, begun = out / "export.json", work / "request.json"
        if not finished.is_file() and not work.is_dir():
            raise UserError(f"output {out} is a folder that holds something else; choose another with -o")
        if begun.is_file() and json.loads(begun.read_text(encoding="utf-8")) == identity:
            sys.stderr.write("going on with the export that was stopped\n")
            return work
        if not force and (finished.is_file() or begun.is_file()):
            what = "an export already" if finished.is_file() else "an unfinished export of other settings or files"
            raise UserError(f"output {out} holds {what}; replace it with --force, or choose another with -o")
        _clear(out)
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output {out} can't be made: {error.strerror}; choose another with -o") from None
    write_json(work / "request.json", identity)
    return work


def _clear(out: Path) -> None:
    """Remove what an export wrote, and nothing else."""
    listed = out / "export.json"
    written = json.loads(listed.read_text(encoding="utf-8"))["written"] if listed.is_file() else []
    for name in [*written, "export.json"]:
        path = out / str(name)
        if path.resolve().parent != out.resolve():
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    shutil.rmtree(out / ".work", ignore_errors=True)


def _identity(request: Request, types: Sequence[str], source: Source) -> dict[str, Any]:
    """What must be equal for a stopped export to go on: the request, and the files it reads (size and time)."""
    folders = [folder for folder in (source.folder, source.base) if folder is not None]
    files = [path for folder in folders for path in sorted(folder.iterdir()) if path.is_file()]
    files += [Path(name) for name in [*request.pairs, request.imatrix] if Path(name).is_file()]
    stamps = {str(path.resolve()): [path.stat().st_size, path.stat().st_mtime_ns] for path in files}
    asked = dataclasses.asdict(request) | {"out": None, "threads": None, "types": list(types)}
    return json.loads(json.dumps({"version": __version__, "asked": asked, "files": stamps}))


def name_of(source: Source) -> str:
    """What the files are called: the run's folder or the model's name, in plain letters."""
    run = source.run.resolve().name if source.run is not None else Path(source.given.rstrip("/")).name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", run).strip("-.") or "judge"
