"""`patarm-lite calibrate`: a judge file learns what its scores mean, and says so in its own metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from patarm_lite.calibration import Calibration, check, fit, observe
from patarm_lite.errors import UserError
from patarm_lite.gguf_file import read_gguf
from patarm_lite.judge.description import PREFIX, describe_foreign, fingerprint, read_description
from patarm_lite.judge.llamacpp import LlamaCpp
from patarm_lite.pairs import drop_long, load_pairs
from patarm_lite.progress import Progress
from patarm_lite.quantize.fidelity import Judged, halves, judge_with, opened
from patarm_lite.quantize.metadata import rewrite
from patarm_lite.records import Pair


def calibrate_file(
    path: Path,
    sources: Sequence[str],
    *,
    seed: int = 1,
    votes: int = 1,
    threads: int | None = None,
    context: int = 4096,
    max_tokens: int = 1024,
    decoding: str = "constrained",
) -> dict[str, Any]:
    """Judge pairs with a GGUF file, fit its calibration on one half of them, check it on the other, write it into the
    file. The fingerprint stays.

    Args:
        sources: pair files, as `pairs.load_pairs` reads them. Pairs that don't fit the context are left out.
        votes: 1 is taken at temperature 0, more at temperature 1.
        context: tokens of a prompt and its judgement together; the model's own limit holds too.
        max_tokens: of a judgement, at most half the context.

    Returns:
        The calibration as JSON values, and `path`, `judged`, `dropped` and `fingerprint`.

    Raises:
        UserError: a file that can't be judged with, or too few readable pairs. The file is then as it was.
    """
    read_description(read_gguf(path).metadata)
    loaded = load_pairs(list(sources))
    model = LlamaCpp.load(path, context=context, threads=threads)
    try:
        max_tokens = min(max_tokens, model.context // 2)
        encoder, description = opened(model)

        def length(pair: Pair) -> int:
            return max(map(len, encoder.pair_ids(pair, description.rubric(pair.task))))

        kept, long = drop_long(loaded.pairs, length, model.context - max_tokens)
        if not kept:
            raise UserError(
                f"none of the {len(loaded.pairs)} pairs leaves room for {max_tokens} tokens of judgement in a context "
                f"of {model.context}; give shorter pairs"
            )
        progress = Progress("judging", 2 * len(kept))
        judged = judge_with(
            model,
            kept,
            seed=seed,
            votes=votes,
            decodings=(decoding,),
            max_tokens=max_tokens,
            progress=lambda done, _: progress.at(done),
        )
    finally:
        model.close()
    found = calibration_of(judged, decoding)
    write_calibration(path, found)
    return {
        "path": str(path),
        "judged": len(kept),
        "dropped": len(loaded.dropped) + len(long),
        "fingerprint": fingerprint(path),
        **json.loads(found.to_json()),
    }


def calibration_table(found: Mapping[str, Any]) -> str:
    """What `calibrate_file` returned, for a person."""
    fitted = Calibration.from_json(json.dumps(found))
    how, checked = found["how"], found["how"]["check"]
    gaps = ", ".join(f"{gap}: {fitted.p_preferred(gap):.0%}" for gap in (1, 2, 3, 5))
    scores = ", ".join(f"{score}: {fitted.percentile(score):.0%}" for score in range(1, 11))
    loss = f"{checked['log_loss']:.3f} (coin {checked['log_loss_coin']:.3f})"
    error = f"{checked['calibration_error']:.3f} (saying 50 % always: {checked['calibration_error_coin']:.3f})"
    return "\n".join(
        [
            f"{found['judged']} pairs judged ({how['decoding']}), {how['unreadable']} unreadable, "
            f"{found['dropped']} left out",
            f"score gap -> preferred   {gaps}",
            f"score -> percentile      {scores}",
            f"on {checked['pairs']} pairs the fit did not see: log loss {loss}, calibration error {error}",
        ]
    )


def calibration_of(judged: Judged, decoding: str = "constrained") -> Calibration:
    """A calibration from a file's judgements: fitted on the choosing half, checked on the reporting one.

    Raises:
        UserError: too few readable pairs in a half.
    """
    choosing, reporting = (
        observe(judged.only(half).pairs[decoding]) for half in halves([j.pair for j in judged.pairs[decoding]])
    )
    fitted = fit(choosing.gaps, choosing.outcomes, choosing.scores)
    if not len(reporting.gaps):
        raise UserError("no readable pair is left to check the calibration on; give more pairs with --pairs FILE")
    how: dict[str, Any] = {
        "decoding": decoding,
        "votes": judged.votes,
        "temperature": 0.0 if judged.votes == 1 else 1.0,
        "seed": judged.seed,
        "gaps_of_expected_scores": choosing.expected,
        "unreadable": choosing.unreadable + reporting.unreadable,
        "check": check(fitted, reporting.gaps, reporting.outcomes),
    }
    return replace(fitted, how=how)


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Put a calibration into a GGUF file, and the fingerprint of what it was measured on.

    Fidelity of other weights than the file's own, which the old fingerprint would give away, is removed.
    """
    now, before = fingerprint(path), read_description(read_gguf(path).metadata)
    changes: dict[str, Any] = {f"{PREFIX}calibration": calibration.to_json(), f"{PREFIX}fingerprint": now}
    if not before.ours:
        changes |= describe_foreign()
    if before.fingerprint not in (None, now):
        changes[f"{PREFIX}fidelity"] = None
    rewrite(path, changes)
