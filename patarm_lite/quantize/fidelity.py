"""How far a quantized judge's verdicts stay those of the original, on held-out pairs. Numpy only.

Every file judges the same pairs, freely and constrained to the protocol's form: one vote at temperature 0, or several
at temperature 1 with common random numbers (a file differs from the original by its weights, not by its luck). Then:

    compare        accuracy of both, the paired difference, verdict flips, scores, unreadable judgements
    divergence     KL(original || file) at every token of the original's own judgements
    candidates     what each file may have lost at most, for `choice.choose`
    report         all of it as JSON, a table and a picture

A loss is the original's accuracy minus the file's: positive is worse.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patarm_lite import __version__, metrics
from patarm_lite.calibration import side_score
from patarm_lite.errors import UserError
from patarm_lite.gguf_file import read_gguf
from patarm_lite.judge.description import Description, read_description
from patarm_lite.judge.llamacpp import LlamaCpp
from patarm_lite.metrics import DRAWS, INTERVAL, paired_difference
from patarm_lite.prompts import Encoder
from patarm_lite.quantize.choice import Candidate, Choice, choose, halves, loss_bound
from patarm_lite.quantize.fidelity_plot import plot
from patarm_lite.quantize.fidelity_table import table
from patarm_lite.records import JudgedPair, Pair, Vote

__all__ = [
    "Candidate",
    "Choice",
    "Divergence",
    "Judged",
    "VerdictTokens",
    "candidates",
    "choose",
    "compare",
    "divergence",
    "halves",
    "judge_file",
    "judge_with",
    "loss_bound",
    "opened",
    "outcome",
    "report",
    "stated",
    "table",
    "verdict_tokens",
    "write_report",
]

Floats = NDArray[np.float64]

SCHEMA = 1
DECODINGS = ("constrained", "free")
"""The first one measured is the headline: judging's default is constrained."""
KEPT = 1e-8
"""Tokens less likely than this are taken together in a divergence, which changes it by far less than it is shown."""
MEMORY = 512_000_000
"""Bytes that the original's distributions may take. What doesn't fit is left out, and the number of judgements said."""
ROW_BYTES = 128_000_000
"""Bytes of logits held at once."""


# --- judging ---


@dataclass(frozen=True, slots=True)
class Judged:
    """A file's judgements of pairs. By way of decoding: the judged pairs, seconds taken, judgement tokens a second (the
    reading of the prompts included)."""

    path: Path
    bytes: int
    seed: int
    votes: int
    pairs: Mapping[str, list[JudgedPair]]
    seconds: Mapping[str, float]
    tokens_per_second: Mapping[str, float]

    def only(self, pairs: Sequence[Pair]) -> Judged:
        """The judgements of some of the pairs, in their order.

        Raises:
            UserError: one of them was not judged.
        """
        found = {}
        for decoding, judged in self.pairs.items():
            by_pair = {_key(j.pair): j for j in judged}
            missing = [pair.id for pair in pairs if _key(pair) not in by_pair]
            if missing:
                raise UserError(f"{self.path} did not judge pair {missing[0]!r}; judge all pairs again")
            found[decoding] = [by_pair[_key(pair)] for pair in pairs]
        return replace(self, pairs=found)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, without the pairs' texts: what an export keeps of a stage that is done."""
        return {
            "bytes": self.bytes,
            "seed": self.seed,
            "votes": self.votes,
            "seconds": dict(self.seconds),
            "tokens_per_second": dict(self.tokens_per_second),
            "judged": {decoding: metrics.judged_to_rows(judged) for decoding, judged in self.pairs.items()},
        }

    @classmethod
    def from_json(cls, path: Path, data: Mapping[str, Any], pairs: Sequence[Pair]) -> Judged:
        """What `to_json` gave, with the pairs that were judged.

        Raises:
            UserError: it is damaged, or of other pairs.
        """
        return cls(
            path,
            data["bytes"],
            data["seed"],
            data["votes"],
            {decoding: metrics.rows_to_judged(rows, pairs) for decoding, rows in data["judged"].items()},
            data["seconds"],
            data["tokens_per_second"],
        )


def _key(pair: Pair) -> tuple[object, ...]:
    return pair.id, pair.prompt, pair.chosen, pair.rejected


def judge_file(
    path: Path,
    pairs: Sequence[Pair],
    *,
    seed: int = 1,
    votes: int = 1,
    threads: int | None = None,
    context: int = 4096,
    decodings: Sequence[str] = DECODINGS,
    max_tokens: int = 1024,
    progress: Callable[[int, int], None] | None = None,
) -> Judged:
    """Judge pairs with a GGUF file, by the protocol and the rubrics it brings.

    Args:
        votes: 1 is taken at temperature 0, more are drawn at temperature 1 with common random numbers.
        context: tokens that a prompt and its judgement may take together.
        max_tokens: of one judgement.
        progress: called with (judging prompts done, of all ways of decoding together).

    Raises:
        UserError: no pairs, a file that can't be loaded, or a prompt that doesn't fit.
    """
    model = LlamaCpp.load(path, context=context, threads=threads)
    try:
        return judge_with(
            model, pairs, seed=seed, votes=votes, decodings=decodings, max_tokens=max_tokens, progress=progress
        )
    finally:
        model.close()


def judge_with(
    model: LlamaCpp,
    pairs: Sequence[Pair],
    *,
    seed: int,
    votes: int,
    decodings: Sequence[str],
    max_tokens: int,
    progress: Callable[[int, int], None] | None = None,
) -> Judged:
    """`judge_file` with a file that is open already."""
    if not pairs:
        raise UserError("there are no pairs to judge; give some with --pairs FILE")
    encoder, description = opened(model)
    prompts = [ids for pair in pairs for ids in encoder.pair_ids(pair, description.rubric(pair.task))]
    judged, seconds, speed = {}, {}, {}
    for number, decoding in enumerate(decodings):
        began = time.perf_counter()
        found = model.votes(
            prompts,
            votes,
            encoder=encoder,
            seed=seed,
            temperature=0.0 if votes == 1 else 1.0,
            decoding=decoding,
            max_tokens=max_tokens,
            progress=_shifted(progress, number * len(prompts), len(decodings) * len(prompts)),
        )
        seconds[decoding] = time.perf_counter() - began
        speed[decoding] = sum(vote.tokens for side in found for vote in side) / seconds[decoding]
        judged[decoding] = [JudgedPair(pair, found[2 * i], found[2 * i + 1]) for i, pair in enumerate(pairs)]
    return Judged(model.path, model.path.stat().st_size, seed, votes, judged, seconds, speed)


def opened(model: LlamaCpp) -> tuple[Encoder, Description]:
    """The prompt encoder of an open file and what the file says of itself."""
    description = read_description(read_gguf(model.path).metadata)
    return model.encoder(description.protocol), description


def _shifted(progress: Callable[[int, int], None] | None, before: int, total: int) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, _: progress(before + done, total)


# --- divergence at verdict tokens ---


@dataclass(frozen=True, slots=True)
class VerdictTokens:
    """The original's distributions at the tokens of its own judgements.

    `sequences`: ids of prompt and judgement, and where the judgement begins. `rows`: for each, at every token of the
    judgement: ids of the tokens that are likelier than KEPT, their log-probabilities, and the probability of all
    others. `judgements`: of how many these could be all.
    """

    sequences: list[tuple[list[int], int]]
    rows: list[list[tuple[NDArray[np.uint32], NDArray[np.float32], float]]]
    judgements: int


@dataclass(frozen=True, slots=True)
class Divergence:
    """KL(original || file) in nats a token, and the share of tokens where both have the same likeliest one."""

    mean: float
    median: float
    p99: float
    top1: float
    tokens: int
    judgements: int
    judgements_possible: int


def verdict_tokens(
    path: Path,
    judged: Sequence[JudgedPair],
    *,
    threads: int | None = None,
    context: int = 4096,
    memory: int = MEMORY,
    progress: Callable[[int, int], None] | None = None,
) -> VerdictTokens:
    """Read the original's judgements again with the original, and keep what it held likely at each token.

    Args:
        path: the original. judged: its judgements; the first vote of each side is read.
        memory: bytes that the kept distributions may take; judgements are taken in an order by hash until it is full.
    """
    model = LlamaCpp.load(path, context=context, threads=threads)
    try:
        encoder, description = opened(model)
        texts = [
            (ids, vote) for j in judged for ids, vote in zip(_sides(j, encoder, description), _first(j), strict=True)
        ]
        texts.sort(key=lambda item: hashlib.sha256(repr(item[0]).encode()).digest())
        kept = VerdictTokens([], [], len(texts))
        taken = 0
        for done, (prompt, vote) in enumerate(texts, 1):
            judgement = encoder.judgement_ids(vote.text)
            ids = [*prompt, *(judgement[:-1] if vote.verdict.problem == "truncated" else judgement)]
            found = [_likely(p) for p in _distributions(model, ids, len(prompt))]
            taken += sum(8 * len(likely) + 200 for likely, _, _ in found)
            if kept.sequences and taken > memory:
                break
            kept.sequences.append((ids, len(prompt)))
            kept.rows.append(found)
            if progress is not None:
                progress(done, len(texts))
    finally:
        model.close()
    return kept


def _sides(judged: JudgedPair, encoder: Encoder, description: Description) -> tuple[list[int], list[int]]:
    return encoder.pair_ids(judged.pair, description.rubric(judged.pair.task))


def _first(judged: JudgedPair) -> tuple[Vote, Vote]:
    return judged.chosen[0], judged.rejected[0]


def _distributions(model: LlamaCpp, ids: Sequence[int], start: int) -> Iterator[Floats]:
    """Probabilities of every token of a judgement, [V] each, as the text before it gives them."""
    places = range(start - 1, len(ids) - 1)
    step = max(1, ROW_BYTES // (4 * model.vocab_size))
    for first in range(0, len(places), step):
        part = places[first : first + step]
        for row in model.logits(ids[: part[-1] + 1], part):
            raised = np.exp(row.astype(np.float64) - row.max())
            yield raised / raised.sum()


def _likely(p: Floats) -> tuple[NDArray[np.uint32], NDArray[np.float32], float]:
    kept = np.flatnonzero(p >= KEPT)
    return kept.astype(np.uint32), np.log(p[kept]).astype(np.float32), max(0.0, 1.0 - float(p[kept].sum()))


def divergence(
    reference: VerdictTokens,
    path: Path,
    *,
    threads: int | None = None,
    context: int = 4096,
    progress: Callable[[int, int], None] | None = None,
) -> Divergence:
    """How far a file's distributions are from the original's, at the same tokens of the same texts.

    Raises:
        UserError: the file has another vocabulary.
    """
    model = LlamaCpp.load(path, context=context, threads=threads)
    found: list[float] = []
    same = 0
    try:
        for done, ((ids, start), rows) in enumerate(zip(reference.sequences, reference.rows, strict=True), 1):
            for (kept, log_p, rest), q in zip(rows, _distributions(model, ids, start), strict=True):
                if len(kept) and kept[-1] >= len(q):
                    raise UserError(f"{path} has {len(q)} tokens, fewer than the original; it is of another judge")
                found.append(_kl(kept, log_p, rest, q))
                same += int(kept[np.argmax(log_p)] == np.argmax(q))
            if progress is not None:
                progress(done, len(reference.sequences))
    finally:
        model.close()
    if not found:
        raise UserError(f"the original wrote no judgements, so {path} can't be compared with it token by token")
    values = np.array(found)
    return Divergence(
        mean=float(values.mean()),
        median=float(np.median(values)),
        p99=float(np.percentile(values, 99)),
        top1=same / len(found),
        tokens=len(found),
        judgements=len(reference.sequences),
        judgements_possible=reference.judgements,
    )


def _kl(kept: NDArray[np.uint32], log_p: NDArray[np.float32], rest: float, q: Floats) -> float:
    """KL of the kept tokens, and of all others as one."""
    p, likely = np.exp(log_p.astype(np.float64)), np.maximum(q[kept], 1e-300)
    value = float(p @ (log_p - np.log(likely)))
    if rest > 0:
        value += rest * math.log(rest / max(1.0 - float(likely.sum()), 1e-300))
    return max(0.0, value)


# --- comparing ---


def compare(reference: Judged, other: Judged, seed: int = 0) -> dict[str, Any]:
    """A file against the original on the pairs both judged: way of decoding -> plain JSON values.

    Keys: `n`; `accuracy` with `_low`, `_high`, `accuracy_reference`, `accuracy_loss` with `_low`, `_high` (95 %), all
    of sampled scores; `expected`: the same of expected scores (None without any); `flips`: share of pairs whose
    outcome (right, tied, wrong or unreadable, by mean scores) changed, `flip_counts` which and how often; `scores`:
    over responses that both could read, of `sampled` and `expected` scores: `n`, `pearson`, `spearman`, `shift` (the
    file's minus the original's) with `_low`, `_high`, `same` (share of equal scores, sampled only); `unreadable` and
    `unreadable_reference`; `loss_bound`; `tokens_per_second` and `tokens_per_second_reference`.

    Raises:
        UserError: the two did not judge the same pairs the same way.
    """
    if (reference.votes, reference.seed) != (other.votes, other.seed) or set(reference.pairs) != set(other.pairs):
        raise UserError(
            f"{reference.path} and {other.path} were judged with different votes, seeds or decodings; judge both alike"
        )
    return {
        decoding: {
            **_compare_pairs(reference.pairs[decoding], other.pairs[decoding], seed),
            "tokens_per_second": other.tokens_per_second[decoding],
            "tokens_per_second_reference": reference.tokens_per_second[decoding],
        }
        for decoding in reference.pairs
    }


def _compare_pairs(reference: Sequence[JudgedPair], other: Sequence[JudgedPair], seed: int) -> dict[str, Any]:
    flips = Counter(
        f"{before} -> {after}"
        for before, after in zip(map(outcome, reference), map(outcome, other), strict=True)
        if before != after
    )
    scored = metrics.accuracy(reference, "expected", seed).readable is not None
    return {
        "n": len(reference),
        **_accuracies(reference, other, "sampled", seed),
        "expected": _accuracies(reference, other, "expected", seed) if scored else None,
        "flips": flips.total() / len(reference),
        "flip_counts": dict(sorted(flips.items())),
        "scores": {kind: _scores(reference, other, kind, seed) for kind in ("sampled", "expected")},
        "unreadable": metrics.unreadable(other),
        "unreadable_reference": metrics.unreadable(reference),
        "loss_bound": loss_bound(reference, other),
    }


def _accuracies(
    reference: Sequence[JudgedPair], other: Sequence[JudgedPair], kind: metrics.ScoreKind, seed: int
) -> dict[str, float]:
    change, low, high = paired_difference(reference, other, kind, seed)
    own = metrics.accuracy(other, kind, seed)
    return {
        "accuracy": own.value,
        "accuracy_low": own.low,
        "accuracy_high": own.high,
        "accuracy_reference": metrics.accuracy(reference, kind, seed).value,
        "accuracy_loss": 0.0 - change,
        "accuracy_loss_low": 0.0 - high,
        "accuracy_loss_high": 0.0 - low,
    }


def outcome(judged: JudgedPair) -> str:
    """`right`, `tied`, `wrong` or `unreadable`, by the mean of each side's readable votes."""
    chosen, rejected = (side_score(side, "sampled") for side in (judged.chosen, judged.rejected))
    if chosen is None or rejected is None:
        return "unreadable"
    return "right" if chosen > rejected else "tied" if chosen == rejected else "wrong"


def _scores(
    reference: Sequence[JudgedPair], other: Sequence[JudgedPair], kind: str, seed: int
) -> dict[str, Any] | None:
    """Scores of responses that both files could read: how they go together and how far they moved."""
    before, after, prompts = [], [], []
    for a, b in zip(reference, other, strict=True):
        for side in metrics.SIDES:
            x, y = side_score(getattr(a, side), kind), side_score(getattr(b, side), kind)
            if x is not None and y is not None:
                before.append(x)
                after.append(y)
                prompts.append(a.pair.prompt)
    if not before:
        return None
    moved = np.array(after) - np.array(before)
    low, high = _mean_interval(moved, prompts, seed)
    found = {
        "n": len(moved),
        "pearson": _pearson(before, after),
        "spearman": metrics.spearman(before, after),
        "shift": float(moved.mean()),
        "shift_low": low,
        "shift_high": high,
    }
    return {**found, "same": float(np.mean(moved == 0))} if kind == "sampled" else found


def _pearson(x: Sequence[float], y: Sequence[float]) -> float | None:
    a, b = np.array(x) - np.mean(x), np.array(y) - np.mean(y)
    spread = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / spread if spread > 0 else None


def _mean_interval(values: Floats, prompts: Sequence[object], seed: int) -> tuple[float, float]:
    """95 % bootstrap interval of a mean, the values of one prompt drawn together."""
    groups: dict[object, int] = {}
    group = np.array([groups.setdefault(prompt, len(groups)) for prompt in prompts])
    total, size = np.bincount(group, weights=values), np.bincount(group)
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(DRAWS):
        drawn = rng.integers(0, len(groups), len(groups))
        means.append(total[drawn].sum() / size[drawn].sum())
    low, high = np.percentile(means, INTERVAL)
    return float(low), float(high)


def candidates(reference: Judged, files: Mapping[str, Judged], choosing: Sequence[Pair]) -> tuple[list[Candidate], int]:
    """(every file with its bound on the choosing half, the worst of its ways of decoding; pairs in that half)."""
    if not choosing:
        return [Candidate(name, file.bytes, 1.0) for name, file in files.items()], 0
    original = reference.only(choosing)
    found = []
    for name, file in files.items():
        part = file.only(choosing)
        bound = max(loss_bound(original.pairs[decoding], part.pairs[decoding]) for decoding in original.pairs)
        found.append(Candidate(name, file.bytes, bound))
    return found, len(choosing)


# --- report ---


def report(
    reference: Judged,
    files: Mapping[str, Judged],
    divergences: Mapping[str, Divergence],
    *,
    headline: str,
    pairs: Sequence[Pair] | None = None,
    original: str = "f16",
    choice: Choice | None = None,
    bounds: Mapping[str, float] | None = None,
    versions: Mapping[str, str] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Everything of fidelity.json.

    Args:
        files, divergences: by type.
        headline: what the table says of its subject.
        pairs: those the figures are of (the reporting half after a choice); none: all that were judged.
        bounds: by type, of the choosing half.
        seed: of the bootstrap.
    """
    if pairs is not None:
        reference, files = reference.only(pairs), {name: file.only(pairs) for name, file in files.items()}
    first = next(iter(reference.pairs))
    rows = []
    for name, file in files.items():
        decodings = compare(reference, file, seed)
        near = divergences.get(name)
        rows.append(
            {
                "type": name,
                "path": file.path.name,
                "bytes": file.bytes,
                "flips": decodings[first]["flips"],
                "accuracy_loss": decodings[first]["accuracy_loss"],
                "loss_bound": max(part["loss_bound"] for part in decodings.values()),
                "loss_bound_choosing": (bounds or {}).get(name),
                "decodings": decodings,
                "kl": None if near is None else {key: getattr(near, key) for key in Divergence.__slots__},
            }
        )
    judged = reference.pairs[first]
    return {
        "schema": SCHEMA,
        "headline": headline,
        "decoding": first,
        "decodings": list(reference.pairs),
        "n": len(judged),
        "prompts": len({j.pair.prompt for j in judged}),
        "half": "all" if pairs is None else "reporting",
        "votes": reference.votes,
        "temperature": 0.0 if reference.votes == 1 else 1.0,
        "seed": reference.seed,
        "reference": {
            "type": original,
            "path": reference.path.name,
            "bytes": reference.bytes,
            "tokens_per_second": dict(reference.tokens_per_second),
            "decodings": {name: _alone(part, seed) for name, part in reference.pairs.items()},
        },
        "files": rows,
        "choice": None if choice is None else {key: getattr(choice, key) for key in Choice.__slots__},
        "versions": {"patarm-lite": __version__, "numpy": np.__version__, **(versions or {})},
    }


def _alone(judged: Sequence[JudgedPair], seed: int) -> dict[str, Any]:
    found = metrics.accuracy(judged, "sampled", seed)
    expected = metrics.accuracy(judged, "expected", seed)
    return {
        "accuracy": found.value,
        "accuracy_low": found.low,
        "accuracy_high": found.high,
        "accuracy_expected": expected.value if expected.readable is not None else None,
        "ties": found.ties,
        "unreadable": metrics.unreadable(judged),
    }


def stated(found: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """What one file says of its own fidelity in its metadata: the row of its type, in short.

    Raises:
        UserError: the report has no such type.
    """
    row = next((row for row in found["files"] if row["type"] == kind), None)
    if row is None:
        raise UserError(f"the fidelity report has no file of type {kind!r}")
    return {
        "schema": SCHEMA,
        "type": kind,
        "reference": found["reference"]["type"],
        "headline": found["headline"],
        **{key: found[key] for key in ("half", "prompts", "votes", "seed")},
        "loss_bound": row["loss_bound"],
        "decodings": row["decodings"],
        "kl": row["kl"],
    }


def write_report(folder: Path, found: Mapping[str, Any]) -> list[Path]:
    """Write fidelity.json, fidelity.md, fidelity.svg and fidelity.png into a folder; each appears by rename."""
    written = {
        "fidelity.json": (json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode(),
        "fidelity.md": table(found).encode(),
        "fidelity.svg": plot(found, "svg"),
        "fidelity.png": plot(found, "png"),
    }
    for name, data in written.items():
        part = folder / (name + ".part")
        try:
            with part.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            part.replace(folder / name)
        finally:
            part.unlink(missing_ok=True)
    return [folder / name for name in written]
