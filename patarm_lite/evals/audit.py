"""What judged pairs say of a judge besides its accuracy: one function a measure, plain JSON values out. Numpy only.

    distribution    which scores it gives, ties, saturation
    leanings        how far it follows length or style where the labels don't
    reliability     score gap against how often the higher one was preferred
    repeatability   other seeds, other scores
    transitivity    comparisons that go in a circle
    rubrics         criteria written, and whether they are about the prompt
    label_noise     what wrong labels would make of the accuracy, and which labels the judge contradicts most surely
    cost            tokens and seconds of a verdict

A side's score is the mean of its readable votes' expected scores where every readable side has one, else of the sampled
ones. A judgement that can't be read is never a score: its pair earns nothing and is in no correlation. Every figure has
its 95 % interval over prompts and its n; where several are looked at for one flaw, as length and style are, their
intervals hold for all of them together (`resampled.together`). What attacks do to a score is in `audit_attacks.py`;
which figure is a flaw, and what to do, in `audit_findings.py`.

Left out: bias of position (a pointwise judge sees one response at a time) and of self-preference (who wrote a response
is not known).
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from patarm_lite import metrics
from patarm_lite.calibration import FEWEST, Calibration, check, fit, side_score
from patarm_lite.evals.resampled import (
    CHANGE,
    Sample,
    figure,
    partial_products,
    rank_correlation,
    ratio,
    ratio_difference,
    share_of,
    together,
)
from patarm_lite.metrics import CELLS, DRAWS, INTERVAL, SIDES, Floats
from patarm_lite.records import JudgedPair, Pair, Verdict, Vote
from patarm_lite.verdicts import SCORES

Json = dict[str, Any]
Scores = list[tuple[float | None, float | None]]

MARKS = re.compile(r"^#{1,6} |\*\*|__|`|^\|.*\|$|^> ", re.MULTILINE)
LISTED = re.compile(r"^[ \t]*(?:[-*+]|\d{1,3}[.)])[ \t]+\S", re.MULTILINE)
FEATURES: dict[str, Callable[[str], float]] = {
    "words": metrics.words,
    "characters": len,
    "markdown marks": lambda text: len(MARKS.findall(text)),
    "list items": lambda text: len(LISTED.findall(text)),
    "exclamation marks": lambda text: text.count("!"),
}
"""Surface of a response -> how much of it. The first two are its length."""
EDGES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Bins of confidence in the plot of reliability."""
NOISE = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
"""Shares of wrong labels that are tried: a convention, from none to nearly a third."""
SUSPECTS = 10
"""Pairs listed whose label the judge contradicts most surely."""
LONGEST = 600
"""Characters of a listed text."""
TRIPLES = 2000
WORD = re.compile(r"[^\W_]{3,}")


def scores_of(judged: Sequence[JudgedPair]) -> tuple[Scores, str]:
    """(chosen, rejected) of each pair, and of which kind they are: `expected` or `sampled`."""
    sides = [(j.chosen, j.rejected) for j in judged]
    sampled = [(side_score(c, "sampled"), side_score(r, "sampled")) for c, r in sides]
    expected = [(side_score(c, "expected"), side_score(r, "expected")) for c, r in sides]
    whole = zip(itertools.chain(*expected), itertools.chain(*sampled), strict=True)
    if all(e is not None for e, s in whole if s is not None):
        return expected, "expected"
    return sampled, "sampled"


def earned(scores: Scores) -> list[float]:
    """What each pair earns: 1, a tie half, unreadable nothing."""
    return [0.0 if c is None or r is None else 1.0 if c > r else 0.5 if c == r else 0.0 for c, r in scores]


def _prompts(judged: Sequence[JudgedPair]) -> list[Any]:
    return [j.pair.prompt for j in judged]


def distribution(judged: Sequence[JudgedPair], seed: int = 0) -> Json:
    """Sampled scores given.

    `counts` (score -> judgements), `commonest` and its `share`, `top` (share of tens), `effective`: 2 to the entropy of
    the scores in bits, i.e. how many scores it would use if it used them evenly. `ties`: pairs whose scores are equal
    (vote against vote, of readable ones).
    """
    counts = Counter(v.verdict.score for v in metrics.judgements(judged) if v.verdict.score is not None)
    total = sum(counts.values())
    ties = [[c.verdict.score == r.verdict.score for c, r in _readable(j)] for j in judged]
    found: Json = {
        "counts": {score: counts[score] for score in SCORES},
        "judgements": total,
        "ties": share_of(_prompts(judged), [sum(t) for t in ties], [len(t) for t in ties], len(judged), seed),
        "commonest": None,
        "share": None,
        "top": None,
        "effective": None,
    }
    if total:
        commonest = max(counts, key=lambda score: (counts[score], score))

        def share(score: int) -> Json | None:
            given = [[v.verdict.score for v in (*j.chosen, *j.rejected) if v.verdict.score is not None] for j in judged]
            counted, all_given = [row.count(score) for row in given], [len(row) for row in given]
            return share_of(_prompts(judged), counted, all_given, total, seed)

        entropy = -sum(n / total * math.log2(n / total) for n in counts.values())
        found |= {"commonest": commonest, "share": share(commonest), "top": share(10), "effective": 2.0**entropy}
    return found


def _readable(j: JudgedPair) -> list[tuple[Vote, Vote]]:
    sides = zip(j.chosen, j.rejected, strict=True)
    return [(c, r) for c, r in sides if c.verdict.score is not None and r.verdict.score is not None]


def leanings(judged: Sequence[JudgedPair], seed: int = 0) -> list[Json]:
    """How far scores follow each feature of the text (see `leaning`); the intervals of `excess` hold for all features
    together, and so do those of `partial`."""
    rows = [leaning(judged, name, feature, seed) for name, feature in FEATURES.items()]
    excess = excess_over_labels(judged, seed)
    partial = together([_at_equal_quality(judged, feature) for feature in FEATURES.values()], seed)
    return [{**row, "excess": e, "partial": p} for row, e, p in zip(rows, excess, partial, strict=True)]


def excess_over_labels(judged: Sequence[JudgedPair], seed: int = 0) -> list[Json | None]:
    """How much more often the judge prefers the response with more of each feature than the labels do: a share of the
    readable pairs that differ in it, with intervals for all features together."""
    samples = [_differing(judged, feature) for feature in FEATURES.values()]
    return together([(d.prompts, [f - m for f, m in zip(d.follows, d.more, strict=True)]) for d in samples], seed)


def _at_equal_quality(judged: Sequence[JudgedPair], feature: Callable[[str], float]) -> Sample:
    """What makes up the partial rank correlation of scores with a feature; empty where the pairs state no quality."""
    groups, values, amounts, quality = _points(judged, feature)
    if not quality or not all(isinstance(q, int | float) for q in quality):
        return [], []
    found = partial_products(values, amounts, quality)
    return ([], []) if found is None else (groups, found)


def _points(
    judged: Sequence[JudgedPair], feature: Callable[[str], float]
) -> tuple[list[Any], list[float], list[float], list[Any]]:
    """Of each readable response: its prompt, score, amount of the feature, and true quality where that is stated."""
    scores, _ = scores_of(judged)
    found: tuple[list[Any], list[float], list[float], list[Any]] = ([], [], [], [])
    for j, both in zip(judged, scores, strict=True):
        for side, score in zip(SIDES, both, strict=True):
            if score is not None:
                row = j.pair.prompt, score, feature(getattr(j.pair, side)), j.pair.meta.get(f"{side}_quality")
                for column, value in zip(found, row, strict=True):
                    column.append(value)
    return found


@dataclass(frozen=True, slots=True)
class _Differing:
    """The readable pairs that differ in a feature: what each earned, whether the chosen response has more of it, and
    whether the judge prefers the one with more (a tie half). [n] each."""

    prompts: list[Any]
    won: list[float]
    more: list[float]
    follows: list[float]


def _differing(judged: Sequence[JudgedPair], feature: Callable[[str], float]) -> _Differing:
    scores, _ = scores_of(judged)
    found = _Differing([], [], [], [])
    for j, (c, r), won in zip(judged, scores, earned(scores), strict=True):
        amounts = feature(j.pair.chosen), feature(j.pair.rejected)
        if amounts[0] != amounts[1] and c is not None and r is not None:
            more = amounts[0] > amounts[1]
            found.prompts.append(j.pair.prompt)
            found.won.append(won)
            found.more.append(float(more))
            found.follows.append(won if more else 1 - won)
    return found


def leaning(judged: Sequence[JudgedPair], name: str, feature: Callable[[str], float], seed: int = 0) -> Json:
    """How far scores follow a feature of the text.

    `correlation`: rank correlation of a response's score with the feature. `partial`: the same with the true quality
    taken out, where the pairs state it. `more`, `fewer`: accuracy where the chosen response has more of it, and where
    it has less; `difference`: of the two. A judge that follows the feature alone gets 1 and 0. `follows`: share of the
    pairs that differ in it in which the judge prefers the response with more (ties half); `labels`: in which the labels
    do; `excess`: the first less the second. `n`: readable pairs that differ in it.
    """
    groups, values, amounts, quality = _points(judged, feature)
    known = bool(quality) and all(isinstance(q, int | float) for q in quality)
    pairs = _differing(judged, feature)
    right, more, follows = np.array(pairs.won), np.array(pairs.more), np.array(pairs.follows)
    n, ones, fewer = len(right), np.ones(len(right)), 1 - more
    sides = [right * more, more, right * fewer, fewer]
    return {
        "feature": name,
        "n": n,
        "correlation": rank_correlation(groups, values, amounts, seed=seed),
        "partial": rank_correlation(groups, values, amounts, quality, seed) if known else None,
        "more": share_of(pairs.prompts, right * more, more, int(more.sum()), seed),
        "fewer": share_of(pairs.prompts, right * fewer, fewer, int(fewer.sum()), seed),
        "difference": figure(pairs.prompts, sides, ratio_difference, n, seed),
        "follows": share_of(pairs.prompts, follows, ones, n, seed),
        "labels": share_of(pairs.prompts, more, ones, n, seed),
        "excess": figure(pairs.prompts, [follows - more, ones], ratio, n, seed, CHANGE),
    }


def reliability(judged: Sequence[JudgedPair], own: Calibration | None = None, seed: int = 0) -> Json | None:
    """Whether a larger gap of scores means a surer preference. None with too few readable pairs.

    Prompts are halved; the slope of P(preferred) = 1 / (1 + exp(-slope gap)) is fitted on each half and checked on the
    other. `slope` is that of all pairs; `one`, `three`: the probability by it that the higher of two responses is the
    preferred one, one and three points apart. `bins`: by the probability of the side the judge favours, how often it
    was right, with intervals (pairs at equal scores are in none). `error`: expected calibration error. `own`: `check`
    of the calibration that the judge's file holds, on all pairs.
    """
    scores, by = scores_of(judged)
    known = [
        (j.pair.prompt, c - r) for j, (c, r) in zip(judged, scores, strict=True) if c is not None and r is not None
    ]
    prompts = list(dict.fromkeys(prompt for prompt, _ in known))
    random.Random(f"reliability {seed}").shuffle(prompts)
    half = set(prompts[: len(prompts) // 2])
    parts = [[row for row in known if (row[0] in half) == first] for first in (True, False)]
    if min(map(len, parts)) < FEWEST:
        return None
    rows: list[tuple[Any, float, float]] = []
    checks = []
    for fitted, other in (parts, parts[::-1]):
        gaps = [gap for _, gap in fitted]
        calibration = fit(gaps, np.ones(len(gaps)), gaps)
        checks.append(check(calibration, [gap for _, gap in other], np.ones(len(other))))
        rows += [(prompt, calibration.p_preferred(abs(gap)), gap) for prompt, gap in other]
    gaps = [gap for _, gap in known]
    weights = [found["pairs"] for found in checks]
    bins = []
    for low, high in itertools.pairwise(EDGES):
        inside = [(g, p, gap) for g, p, gap in rows if gap and low <= p and (p < high or high == EDGES[-1])]
        if inside:
            won = np.array([float(gap > 0) for *_, gap in inside])
            right = share_of([group for group, _, _ in inside], won, np.ones(len(won)), len(won), seed)
            bins.append({"from": low, "to": high, "said": float(np.mean([p for _, p, _ in inside])), "right": right})
    whole = fit(gaps, np.ones(len(gaps)), gaps)
    return {
        "by": by,
        "pairs": len(known),
        "slope": whole.slope,
        "one": whole.p_preferred(1.0),
        "three": whole.p_preferred(3.0),
        "error": float(np.average([found["calibration_error"] for found in checks], weights=weights)),
        "log_loss": float(np.average([found["log_loss"] for found in checks], weights=weights)),
        "log_loss_coin": math.log(2),
        "bins": bins,
        "own": None if own is None else check(own, gaps, np.ones(len(gaps))),
    }


def repeatability(judged: Sequence[JudgedPair], seed: int = 0) -> Json | None:
    """What another seed would say: every vote has a seed of its own. None with fewer than two votes.

    `spread`: root mean square over responses of the standard deviation (n - 1) of their votes' sampled scores.
    `one_vote`: the share of the scores' variance that lies between responses and not between votes, ICC(1) of one-way
    analysis of variance, over responses with k readable votes. `flips`: how often two votes of one pair disagree about
    who is better (a tie is an answer of its own). `accuracy`: of each vote alone.
    """
    k = metrics.votes(judged)
    if k < 2:
        return None
    sides = [[v.verdict.score for v in getattr(j, side)] for j in judged for side in SIDES]
    whole = np.array([scores for scores in sides if None not in scores], dtype=float)
    several = [[s for s in scores if s is not None] for scores in sides]
    variances = [float(np.var(scores, ddof=1)) for scores in several if len(scores) > 1]
    flips = []
    for j in judged:
        signs = [np.sign(c.verdict.score - r.verdict.score) for c, r in _readable(j)]  # type: ignore[operator]
        two = list(itertools.combinations(signs, 2))
        flips.append((sum(a != b for a, b in two), len(two)))
    alone = []
    for index in range(k):
        one = [JudgedPair(j.pair, (j.chosen[index],), (j.rejected[index],)) for j in judged]
        alone.append(metrics.accuracy(one, "sampled", seed).value)
    return {
        "votes": k,
        "responses": len(variances),
        "spread": math.sqrt(sum(variances) / len(variances)) if variances else None,
        "one_vote": _icc(whole),
        "flips": share_of(_prompts(judged), [a for a, _ in flips], [b for _, b in flips], len(judged), seed),
        "accuracy": alone,
        "accuracy_spread": float(np.std(alone, ddof=1)),
    }


def _icc(scores: Any) -> float | None:
    """ICC(1) of [responses, votes]: (MSB - MSW) / (MSB + (k - 1) MSW); None where there is no variance at all."""
    if len(scores) < 2:
        return None
    count, k = scores.shape
    means = scores.mean(axis=1)
    between = k * float(((means - scores.mean()) ** 2).sum()) / (count - 1)
    within = float(((scores - means[:, None]) ** 2).sum()) / (count * (k - 1))
    whole = between + (k - 1) * within
    return (between - within) / whole if whole > 0 else None


def transitivity(judged: Sequence[JudgedPair], seed: int = 0) -> Json:
    """Circles (a over b over c over a) among triples of responses to one prompt, of the pairs that share a prompt.

    Mean scores can't go in a circle; comparisons that are each made with fresh judgements can. `circles`: their mean
    probability over triples if each of the three comparisons draws its two scores from the votes that there are; a
    coin without ties would have 0.25. `majority`: triples in a circle by who wins more of the k x k comparisons.
    `labels`: triples whose own labels go in a circle, of those with three labels. `n` is 0 where no prompt has three
    responses with readable votes. Where the pairs state true quality, triples with two equally good responses are left
    out: their order is no judge's fault.
    """
    responses, labels = _by_prompt(judged)
    triples = [
        (prompt, three)
        for prompt, found in responses.items()
        for three in itertools.combinations(sorted(found), 3)
        if len({found[text].quality for text in three} - {None}) in (0, 3)
    ]
    made = len(triples)
    if made > TRIPLES:
        triples = random.Random(f"triples {seed}").sample(triples, TRIPLES)
    circles, majority, labelled, circular = [], [], 0, 0
    for prompt, texts in triples:
        a, b, c = (responses[prompt][text].scores for text in texts)
        around = _beats(a, b), _beats(b, c), _beats(c, a)
        back = _beats(b, a), _beats(c, b), _beats(a, c)
        circles.append(math.prod(around) + math.prod(back))
        wins = [f > g for f, g in zip(around, back, strict=True)]
        losses = [f < g for f, g in zip(around, back, strict=True)]
        majority.append(float(all(wins) or all(losses)))
        sides = [(x, y) for x, y in itertools.permutations(texts, 2) if (prompt, x, y) in labels]
        if len({frozenset(two) for two in sides}) == 3:
            labelled += 1
            x, y, z = texts
            circular += {(x, y), (y, z), (z, x)} <= set(sides) or {(y, x), (z, y), (x, z)} <= set(sides)
    groups = [prompt for prompt, _ in triples]
    ones = np.ones(len(triples))
    return {
        "n": len(triples),
        "of": made,
        "prompts": len(set(groups)),
        "circles": share_of(groups, circles, ones, len(triples), seed),
        "majority": share_of(groups, majority, ones, len(triples), seed),
        "labelled": labelled,
        "labels": circular / labelled if labelled else None,
    }


@dataclass(frozen=True, slots=True)
class _Response:
    """Readable sampled scores of a response, and its true quality where that is stated."""

    scores: list[int]
    quality: Any


def _by_prompt(judged: Sequence[JudgedPair]) -> tuple[dict[Any, dict[str, _Response]], set[tuple[Any, str, str]]]:
    """The readable responses to each prompt, and (prompt, chosen, rejected) of every label."""
    found: dict[Any, dict[str, _Response]] = defaultdict(dict)
    labels: set[tuple[Any, str, str]] = set()
    for j in judged:
        labels.add((j.pair.prompt, j.pair.chosen, j.pair.rejected))
        for side in SIDES:
            scores = [v.verdict.score for v in getattr(j, side) if v.verdict.score is not None]
            if scores:
                response = _Response(scores, j.pair.meta.get(f"{side}_quality"))
                found[j.pair.prompt].setdefault(getattr(j.pair, side), response)
    return found, labels


def _beats(a: Sequence[int], b: Sequence[int]) -> float:
    return sum(x > y for x in a for y in b) / (len(a) * len(b))


def rubrics(judged: Sequence[JudgedPair], seed: int = 0) -> Json | None:
    """The rubrics that judgements write. None where no readable judgement has one.

    `criteria`: mean number in a judgement. `duplicates`: judgements that name one criterion twice. `faulty`: judgements
    with any fault. `overlap`: share of a rubric's words (of three letters and more) that its prompt has too; `others`:
    that another prompt of the same task has (the next one of the file); `fit`: their difference, 0 for rubrics that
    would do for any prompt. `commonest`: share of the judgements that use the most frequent set of criteria names.
    `follows`: rank correlation of the score with the weighted mean of the criteria's own scores.
    """
    following = _other_prompts(judged)
    rows, sets, points = [], Counter[frozenset[str]](), []
    for place, j in enumerate(judged):
        next_one = following[place]
        own, other = _words_of(j.pair), None if next_one is None else _words_of(next_one)
        for vote in (*j.chosen, *j.rejected):
            verdict = vote.verdict
            if verdict.score is None or not verdict.rubric:
                continue
            words = set(WORD.findall(" ".join(f"{c.name} {c.description}" for c in verdict.rubric).casefold()))
            shares = [len(words & them) / len(words) if words and them is not None else None for them in (own, other)]
            names = [c.name.casefold() for c in verdict.rubric]
            sets[frozenset(names)] += 1
            rows.append((j.pair.prompt, len(names), len(set(names)) < len(names), bool(verdict.faults), shares))
            mean = _weighted(verdict)
            if mean is not None:
                points.append((j.pair.prompt, float(verdict.score), mean))
    if not rows:
        return None
    groups, ones = [row[0] for row in rows], np.ones(len(rows))
    both = [(g, a, b) for g, *_, (a, b) in rows if a is not None and b is not None]
    two = [g for g, _, _ in both]

    def mean_of(column: Sequence[float]) -> Json | None:
        return figure(groups, [column, ones], ratio, len(rows), seed)

    def over(column: Sequence[float]) -> Json | None:
        return figure(two, [column, np.ones(len(both))], ratio, len(both), seed)

    return {
        "judgements": len(rows),
        "criteria": mean_of([row[1] for row in rows]),
        "counts": {str(size): n for size, n in sorted(Counter(row[1] for row in rows).items())},
        "duplicates": mean_of([float(row[2]) for row in rows]),
        "faulty": mean_of([float(row[3]) for row in rows]),
        "overlap": over([a for _, a, _ in both]),
        "others": over([b for _, _, b in both]),
        "fit": over([a - b for _, a, b in both]),
        "sets": len(sets),
        "commonest": sets.most_common(1)[0][1] / len(rows),
        "follows": rank_correlation(
            [point[0] for point in points], [point[1] for point in points], [point[2] for point in points], seed=seed
        )
        if points
        else None,
    }


def _other_prompts(judged: Sequence[JudgedPair]) -> list[Pair | None]:
    """For each pair one of the same task with another prompt: the next one of the file, in a circle."""
    by_task: dict[str, dict[Any, Pair]] = defaultdict(dict)
    for j in judged:
        by_task[j.pair.task].setdefault(j.pair.prompt, j.pair)
    following: dict[tuple[str, Any], Pair] = {}
    for task, found in by_task.items():
        pairs = list(found.values())
        if len(pairs) > 1:
            following |= {(task, p.prompt): pairs[(i + 1) % len(pairs)] for i, p in enumerate(pairs)}
    return [following.get((j.pair.task, j.pair.prompt)) for j in judged]


def _words_of(pair: Pair) -> set[str]:
    return set(WORD.findall(" ".join(turn.content for turn in pair.prompt).casefold()))


def _weighted(verdict: Verdict) -> float | None:
    weights = {c.name: c.weight for c in verdict.rubric}
    known = [(weights[c.name], c.score) for c in verdict.criterion_scores if weights.get(c.name)]
    return sum(w * s for w, s in known) / sum(w for w, _ in known) if known else None


def label_noise(judged: Sequence[JudgedPair], seed: int = 0) -> Json:
    """What wrong labels in the pair file would do to the accuracy, and which labels look wrong to the judge.

    `rows`, one for each share f of wrong labels. `flipped`: the accuracy if each of these labels were flipped with
    probability f, its mean over DRAWS random flips and between which values 95 % of them lie. `true`: the accuracy
    against right labels that the measured one would mean, (A - f R) / (1 - 2 f) with A the accuracy and R the share of
    readable pairs, with its interval over prompts, 1 / (1 - 2 f) times as wide; None where A is impossible then.
    `ceiling`: what a perfect judge would get on such labels, 1 - f. `most`: the share R - A above which A is
    impossible.

    `by`: what is flipped as one, the pairs of a prompt where prompts have several (they mostly have one source), else
    a pair. `contradictions`: pairs of responses that the file labels both ways, of `asked` that it labels at all.
    `suspects`: see `suspects`.
    """
    scores, _ = scores_of(judged)
    won = np.array(earned(scores))
    readable = np.array([float(c is not None and r is not None) for c, r in scores])
    accuracy, known = float(won.mean()), float(readable.mean())
    asked: dict[Any, set[str]] = defaultdict(set)
    for j in judged:
        asked[j.pair.prompt, frozenset((j.pair.chosen, j.pair.rejected))].add(j.pair.chosen)
    prompts = _prompts(judged)
    shared = len(set(prompts)) < len(prompts)
    units = prompts if shared else list(range(len(judged)))
    return {
        "accuracy": accuracy,
        "readable": known,
        "most": max(0.0, known - accuracy),
        "by": "prompt" if shared else "pair",
        "rows": [
            {
                "noise": f,
                "flipped": _flipped(units, won, readable, f, seed),
                "ceiling": 1 - f,
                "true": _true(prompts, won, readable, f, seed),
            }
            for f in NOISE
        ],
        "contradictions": sum(len(better) > 1 for better in asked.values()),
        "asked": len(asked),
        "suspects": suspects(judged, seed),
    }


def _flipped(units: Sequence[Any], won: Floats, readable: Floats, share: float, seed: int) -> Json:
    """Accuracy where labels are flipped at random: a flip turns a win into a loss; a pair that can't be read earns
    nothing either way."""
    names: dict[Any, int] = {}
    place = np.array([names.setdefault(unit, len(names)) for unit in units])
    change = np.bincount(place, weights=readable - 2 * won)
    rng = np.random.default_rng(seed)
    block = max(1, CELLS // len(names))
    found = []
    for start in range(0, DRAWS, block):
        flips = rng.random((min(block, DRAWS - start), len(names))) < share
        found.append((won.sum() + flips @ change) / len(won))
    draws = np.concatenate(found)
    low, high = np.percentile(draws, INTERVAL)
    return {"value": float(draws.mean()), "low": float(low), "high": float(high), "n": len(won)}


def _true(prompts: Sequence[Any], won: Floats, readable: Floats, share: float, seed: int) -> Json | None:
    found = figure(
        prompts,
        [won, readable, np.ones(len(won))],
        lambda totals: (totals[0] - share * totals[1]) / totals[2] / (1 - 2 * share),
        len(won),
        seed,
    )
    assert found is not None
    if not -1e-12 <= found["value"] <= readable.mean() + 1e-12:
        return None
    return found | {"low": max(0.0, found["low"]), "high": min(1.0, found["high"])}


def suspects(judged: Sequence[JudgedPair], seed: int = 0) -> Json:
    """Pairs whose label the judge contradicts most surely: in every one of its votes the rejected response scores
    higher (votes are matched by their number). Whether the label is wrong or the judge, this can't tell.

    `contradicted`: how many there are, of `n` pairs whose votes can all be read. `listed`: the first SUSPECTS of them,
    the largest of the smallest gaps first: id, `gap` (mean over votes, points), `least` (smallest over votes), and the
    texts, cut. `if_listed`, `if_all`: the accuracy if the labels of those were wrong, with intervals.
    """
    rows = []
    readable = 0
    for place, j in enumerate(judged):
        votes = _readable(j)
        if len(votes) < len(j.chosen):
            continue
        readable += 1
        gaps = [(r.verdict.score or 0) - (c.verdict.score or 0) for c, r in votes]
        if min(gaps) > 0:
            rows.append((min(gaps), sum(gaps) / len(gaps), place))
    rows.sort(key=lambda row: (-row[0], -row[1], row[2]))
    scores, _ = scores_of(judged)
    prompts, ones = _prompts(judged), np.ones(len(judged))

    def accuracy(wrong: Sequence[int]) -> Json | None:
        won = np.array(earned(scores))
        won[list(wrong)] = 1 - won[list(wrong)]
        return share_of(prompts, won, ones, len(judged), seed)

    places = [place for *_, place in rows]
    return {
        "n": readable,
        "contradicted": len(rows),
        "listed": [_suspect(judged[place], gap, least) for least, gap, place in rows[:SUSPECTS]],
        "if_listed": accuracy(places[:SUSPECTS]),
        "if_all": accuracy(places),
    }


def _suspect(j: JudgedPair, gap: float, least: int) -> Json:
    prompt = "\n".join(f"{turn.role}: {turn.content}" for turn in j.pair.prompt)
    texts = {"prompt": prompt, "chosen": j.pair.chosen, "rejected": j.pair.rejected}
    cut = {name: text if len(text) <= LONGEST else f"{text[:LONGEST]} …" for name, text in texts.items()}
    return {"id": j.pair.id, "gap": gap, "least": least, "votes": len(j.chosen), **cut}


def cost(judged: Sequence[JudgedPair], prompt_tokens: Sequence[int], drawn: int, seconds: float) -> Json:
    """What a verdict costs: `prompt_tokens` of its judging prompt (mean; the votes on one response share it), `tokens`
    written (mean, and `tokens_90` in nine of ten at most), `seconds` (mean over the `drawn` verdicts that were drawn
    in this run; None: fewer than FEWEST). `thousand`: the same for a thousand verdicts, in tokens and minutes.
    `accurate`: tokens written for a pair that was judged right.
    """
    written = [vote.tokens for vote in metrics.judgements(judged)]
    right = sum(earned(scores_of(judged)[0]))
    each = seconds / drawn if drawn >= FEWEST else None
    read, tokens = float(np.mean(prompt_tokens)), float(np.mean(written))
    return {
        "verdicts": len(written),
        "prompt_tokens": read,
        "tokens": tokens,
        "tokens_90": float(np.percentile(written, 90)),
        "drawn": drawn,
        "seconds": each,
        "thousand": {
            "prompt_tokens": 1000 * read,
            "tokens": 1000 * tokens,
            "minutes": None if each is None else 1000 * each / 60,
        },
        "accurate": sum(written) / right if right else None,
    }


def measures(judged: Sequence[JudgedPair], own: Calibration | None = None, seed: int = 0) -> Json:
    """All measures of judged pairs but attacks and cost."""
    scores, by = scores_of(judged)
    return {
        "by": by,
        "pairs": len(judged),
        "prompts": len(set(_prompts(judged))),
        "votes": metrics.votes(judged),
        "truth": all(f"{side}_quality" in j.pair.meta for j in judged for side in SIDES),
        "summary": metrics.summarise(judged, seed),
        "accuracy": share_of(_prompts(judged), earned(scores), np.ones(len(scores)), len(scores), seed),
        "longer_wins": metrics.longer_wins([j.pair for j in judged])["words"],
        "distribution": distribution(judged, seed),
        "leaning": leanings(judged, seed),
        "reliability": reliability(judged, own, seed),
        "repeatability": repeatability(judged, seed),
        "transitivity": transitivity(judged, seed),
        "rubrics": rubrics(judged, seed),
        "label_noise": label_noise(judged, seed),
    }
