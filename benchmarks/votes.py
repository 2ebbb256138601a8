"""Adaptive voting against a fixed number of votes: how many votes it takes, and what it costs in accuracy.

    python benchmarks/votes.py                                              # simulated judges, some seconds
    python benchmarks/votes.py my-judge.gguf --pairs heldout.jsonl          # yours: 16 votes a side, drawn once
    python benchmarks/votes.py my-judge.gguf --pairs heldout.jsonl --keep votes.json --error 0.1

With a judge, all votes of all pairs are drawn first (constrained, temperature 1, expected scores) and kept in the file
that --keep names; the same command reads them back. Every way of voting is then replayed on these same votes, so that
differences are paired: intervals are 95 % bootstraps over prompts. `wrong`: share of the settled pairs whose order is
not that of all votes drawn, by more than the margin. `rounds`: times that a pair was voted on, each of which reads its
prompts anew unless the runtime keeps them.

Simulated judges have known means, so there `wrong` is against the truth. `normal`: both sides scatter with that spread
around means that far apart, rounded and cut to 1..10. `jumps`: one side says 9 and, with that chance, a score so many
points lower; the other says always the same, which is higher than the first one's mean by the gap.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patarm_lite.errors import UserError
from patarm_lite.judge.voting import VotePlan, Votes
from patarm_lite.metrics import accuracy, paired_difference
from patarm_lite.records import JudgedPair, Pair, Verdict, Vote

FIXED = (1, 2, 4, 8, 16)
AGAINST = 8
CHUNK = 64
"""Pairs judged in one call."""
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Replayed:
    """A rule on some pairs: the pairs with the votes it took, rounds, which are settled and which of those wrongly."""

    judged: list[JudgedPair]
    votes: Floats
    rounds: Floats
    settled: NDArray[np.bool_]
    wrong: NDArray[np.bool_]


def replay(judged: Sequence[JudgedPair], plan: VotePlan, truth: Floats | None = None) -> Replayed:
    """Run the rule on votes that are drawn already.

    Args:
        truth: true gaps, chosen minus rejected, [N]; by default those of the means of all votes.
    """
    taken, votes, rounds, settled, wrong = [], [], [], [], []
    for number, pair in enumerate(judged):
        sides = (pair.chosen, pair.rejected)
        state = Votes(plan, 2)
        turns = 0
        while due := state.due():
            turns += 1
            for place, indices in due:
                for index in indices:
                    state.add(place, index, sides[place][index])
        outcome = state.outcome()
        gap = mean_gap(pair, outcome.reading) if truth is None else float(truth[number])
        taken.append(JudgedPair(pair.pair, state.votes(0), state.votes(1)))
        votes.append(sum(outcome.votes) / 2)
        rounds.append(turns)
        settled.append(outcome.settled)
        wrong.append(outcome.settled and (gap if outcome.order[0] == 0 else -gap) < -plan.margin)
    return Replayed(taken, np.array(votes), np.array(rounds, float), np.array(settled), np.array(wrong))


def mean_gap(pair: JudgedPair, reading: str) -> float:
    """Difference of the two sides' mean readings over all votes."""

    def mean(side: Sequence[Vote]) -> float:
        values = [v.expected if reading == "expected" else v.verdict.score for v in side if v.verdict.score is not None]
        return float(np.mean([value for value in values if value is not None]))

    return mean(pair.chosen) - mean(pair.rejected)


# --- a judge ---


def draw(judge: Path, pairs: Sequence[Pair], votes: int, seed: int, threads: int | None) -> list[JudgedPair]:
    """Votes of both sides of all pairs, constrained, at temperature 1."""
    from patarm_lite.judge.llamacpp import LlamaCpp
    from patarm_lite.quantize.fidelity import judge_with

    found: list[JudgedPair] = []
    with LlamaCpp.load(judge, threads=threads, sequences=64) as model:
        for start in range(0, len(pairs), CHUNK):
            part = pairs[start : start + CHUNK]
            judged = judge_with(model, part, seed=seed, votes=votes, decodings=["constrained"], max_tokens=1024)
            found += judged.pairs["constrained"]
            print(f"{len(found)} of {len(pairs)} pairs", file=sys.stderr, flush=True)
    return found


def drawn(args: argparse.Namespace) -> list[JudgedPair]:
    """The votes of a judge on a pair file, read from --keep where they are there already."""
    from patarm_lite.pairs import load_pairs

    pairs = load_pairs([str(path) for path in args.pairs]).pairs
    if args.keep and args.keep.is_file():
        kept = json.loads(args.keep.read_text(encoding="utf-8"))
        if [row["id"] for row in kept] != [pair.id for pair in pairs]:
            raise UserError(f"{args.keep} holds votes on other pairs than {args.pairs[0]}; name another file")
        return [
            JudgedPair(pair, *(tuple(vote_of(*vote) for vote in row[side]) for side in ("chosen", "rejected")))
            for pair, row in zip(pairs, kept, strict=True)
        ]
    judged = draw(args.judge, pairs, args.most, args.seed, args.threads)
    if args.keep:
        rows = [
            {
                "id": j.pair.id,
                "chosen": [[v.verdict.score, v.expected] for v in j.chosen],
                "rejected": [[v.verdict.score, v.expected] for v in j.rejected],
            }
            for j in judged
        ]
        part = args.keep.with_name(args.keep.name + ".part")
        part.write_text(json.dumps(rows), encoding="utf-8")
        os.replace(part, args.keep)
    return judged


def vote_of(score: int | None, expected: float | None = None) -> Vote:
    return Vote(Verdict(score, None if score else "truncated"), "", expected)


def compare(judged: Sequence[JudgedPair], plans: dict[str, VotePlan]) -> list[dict[str, Any]]:
    """Fixed numbers of votes and rules on the same votes: one row each, differences from `AGAINST` votes."""
    most = len(judged[0].chosen)
    ways: dict[str, tuple[list[JudgedPair], dict[str, Any]]] = {}
    for k in (k for k in FIXED if k <= most):
        cut = [replace(j, chosen=j.chosen[:k], rejected=j.rejected[:k]) for j in judged]
        ways[f"fixed {k}"] = cut, {"votes": float(k), "rounds": 1.0, "settled": None, "wrong": None}
    for name, plan in plans.items():
        found = replay(judged, plan)
        share = float(found.wrong.sum() / max(1, found.settled.sum()))
        ways[name] = (
            found.judged,
            {
                "votes": float(found.votes.mean()),
                "rounds": float(found.rounds.mean()),
                "settled": float(found.settled.mean()),
                "wrong": share,
            },
        )
    base = [means_only(j) for j in ways[f"fixed {min(AGAINST, most)}"][0]]
    rows = []
    for name, (cut, figures) in ways.items():
        row: dict[str, Any] = {"way": name, **figures}
        for score in ("mean", "expected"):
            if score == "expected" and all(vote.expected is None for j in cut for vote in j.chosen):
                continue
            short = [means_only(j) for j in cut]
            row[score] = accuracy(short, score).value
            row[f"{score}_difference"] = paired_difference(base, short, score)
        rows.append(row)
    return rows


def means_only(judged: JudgedPair) -> JudgedPair:
    """A pair with one vote a side that stands for all: numbers of votes differ between pairs, and metrics wants one."""

    def one(side: Sequence[Vote]) -> tuple[Vote]:
        readable = [vote for vote in side if vote.verdict.score is not None]
        expected = [vote.expected for vote in readable if vote.expected is not None]
        score: Any = sum(v.verdict.score or 0 for v in readable) / len(readable) if readable else None
        return (Vote(Verdict(score, None if readable else "truncated"), "", mean_or_none(expected)),)

    return JudgedPair(judged.pair, one(judged.chosen), one(judged.rejected))


def mean_or_none(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


# --- simulated judges ---


Family = Callable[[np.random.Generator, int, int], tuple[Floats, Floats, Floats]]


def normal(spread: float, gap: float) -> Family:
    """Scores around a mean, rounded and cut to 1..10; the true gap is that of the rounded ones."""

    def side(rng: np.random.Generator, centre: Floats, votes: int) -> Floats:
        return np.clip(np.rint(centre[:, None] + spread * rng.standard_normal((len(centre), votes))), 1, 10)

    def drawn(rng: np.random.Generator, pairs: int, votes: int) -> tuple[Floats, Floats, Floats]:
        centre = rng.uniform(3, 8, pairs)
        return side(rng, centre + gap / 2, votes), side(rng, centre - gap / 2, votes), np.full(pairs, gap)

    return drawn


def jumps(chance: float, far: float, gap: float) -> Family:
    """One side jumps and the other, whose true mean is higher by `gap`, doesn't: few votes show the wrong order."""

    def drawn(rng: np.random.Generator, pairs: int, votes: int) -> tuple[Floats, Floats, Floats]:
        jumping: Floats = 9.0 - far * (rng.random((pairs, votes)) < chance).astype(np.float64)
        return np.full((pairs, votes), 9 - chance * far + gap), jumping, np.full(pairs, gap)

    return drawn


SIMULATED: dict[str, Family] = {
    **{f"normal, spread {s}, gap {g}": normal(s, g) for s in (0.3, 0.7, 1.2, 2.0) for g in (0.5, 1.0, 2.0, 4.0)},
    **{
        f"jumps of {far} in {chance:.0%}, gap {g}": jumps(chance, far, g)
        for chance in (0.1, 0.3)
        for far in (3, 6)
        for g in (0.3, 1.0)
    },
}


def simulate(plan: VotePlan, pairs: int, seed: int) -> list[dict[str, Any]]:
    """The rule on simulated judges: one row each."""
    rows = []
    for number, (name, family) in enumerate(SIMULATED.items()):
        first, second, truth = family(np.random.default_rng([seed, number]), pairs, plan.most)
        judged = [
            JudgedPair(Pair((), "a", "b"), *(tuple(vote_of(5, float(x)) for x in side) for side in sides))
            for sides in zip(first, second, strict=True)
        ]
        found = replay(judged, plan, truth)
        rows.append(
            {
                "judge": name,
                "votes": float(found.votes.mean()),
                "rounds": float(found.rounds.mean()),
                "settled": float(found.settled.mean()),
                "wrong": float(found.wrong.sum() / max(1, found.settled.sum())),
            }
        )
    return rows


# --- output ---


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as a Markdown table."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "| --- |" + " ---: |" * (len(columns) - 1)]
    lines += ["| " + " | ".join(cell(name, row.get(name)) for name in columns) + " |" for row in rows]
    return "\n".join(lines)


def cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if isinstance(value, tuple):
        return f"{value[0]:+.4f} ({value[1]:+.4f} to {value[2]:+.4f})"
    return f"{value:.2f}" if name in ("votes", "rounds") else f"{value:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("judge", nargs="?", type=Path, help="a GGUF judge; none: simulated ones")
    parser.add_argument("--pairs", nargs="+", type=Path, help="pairs that the judge never saw")
    parser.add_argument("--keep", type=Path, help="file for the drawn votes")
    parser.add_argument("--most", type=int, default=16)
    parser.add_argument("--error", type=float, default=VotePlan().error)
    parser.add_argument("--margin", type=float, default=VotePlan().margin)
    parser.add_argument("--doubt", type=float, default=VotePlan().doubt)
    parser.add_argument("--least", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--simulated-pairs", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    try:
        plan = VotePlan(most=args.most, error=args.error, margin=args.margin, doubt=args.doubt)
        if args.judge is None:
            rows = simulate(plan, args.simulated_pairs, args.seed)
        elif not args.pairs:
            raise UserError("a judge needs pairs to judge; give some with --pairs FILE")
        else:
            plans = {
                f"auto, {reading}, least {least}": replace(plan, reading=reading, least=least)
                for reading in ("expected", "sampled")
                for least in args.least
            }
            rows = compare(drawn(args), plans)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    print(json.dumps(rows, indent=1) if args.json else table(rows))


if __name__ == "__main__":
    main()
