"""What attacks do to a judge's scores on the user's own responses, or on the arena's, where the truth is known.

Each case is a response with an attack at its end and the same response with a benign text as long. On arena pairs both
also meet the same of the asked criteria (`injection.cases`), so the rise from one to the other is what the attack did.

On other pairs the true quality is not known, and a judge may honestly mislike the benign text more than the attack. So
there an attack counts only where the score rises above that of the bare response too: no text of ours makes somebody's
response better, so that is what an attacker would gain. Its benign texts are whole sentences from elsewhere, and the
family that repeats the prompt repeats the response's own.

There are a dozen families, so the intervals hold for all of them together (`resampled.together`): where attacks change
nothing but at random, one audit in twenty has a family whose interval excludes 0.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from patarm_lite.evals.attacks import ECHO, ECHOES, ENCODED_ONLY, PERSUASIVE, PLAIN, STRUCTURAL
from patarm_lite.evals.drawn import Part
from patarm_lite.evals.injection import LONGEST, Case, cases_on
from patarm_lite.evals.resampled import together
from patarm_lite.judge.backend import Item
from patarm_lite.records import Pair, Vote

if TYPE_CHECKING:
    from patarm_lite.judge.judge import Judge

FAMILIES = {name: texts for name, texts in STRUCTURAL.items() if name not in ENCODED_ONLY} | PERSUASIVE
CASES = 40
"""Cases of each family by default. A case's change has a standard deviation of 1.8 to 3.2 points on the arena's judges
that were tried, so 40 cases find a rise of 1.25 to 2.2 points in nine of ten audits. They cost 960 verdicts (1,000
where the truth is not known) of the 2,560 of an audit of 200 pairs; half the rise would take four times as many."""
QUICK = 10
"""Cases that `--quick` takes, the fewest that can tell anything: rises of some points."""
ECHOED = 24
"""Words of a prompt that are repeated at most."""


@dataclass(frozen=True, slots=True)
class Attacks:
    """Cases to be judged. `truth`: whether true quality is held equal."""

    cases: tuple[Case, ...]
    truth: bool

    @property
    def texts(self) -> list[tuple[Case, str]]:
        """What is judged of each case, in order: attacked, benign, and the bare response where truth is not known."""
        return [
            (case, text)
            for case in self.cases
            for text in (case.attacked, case.benign, *(() if self.truth else (case.response,)))
        ]


def attacks_on(pairs: Sequence[Pair], tokens: Callable[[str], int], n: int, seed: int) -> Attacks:
    """n cases of each family, on responses of different prompts as far as there are such.

    Args:
        tokens: text -> how many tokens a judge reads for it.
    """
    rng = random.Random(f"attacks {seed}")
    responses = _in_turn(pairs, rng)
    if all("criteria" in pair.meta for pair in pairs):
        return Attacks(tuple(cases_on(FAMILIES, responses, tokens, n, seed)), truth=True)
    return Attacks(tuple(_cases(responses, tokens, n, rng)), truth=False)


def content_tokens(judge: Judge, pair: Pair) -> Callable[[str], int]:
    """Text -> how many tokens a judge reads for it as a response to a pair's prompt."""
    bare = judge.item(pair.prompt, "", task=pair.task)
    base = judge.backend.prompt_tokens(bare)
    return lambda text: judge.backend.prompt_tokens(replace(bare, response=text)) - base


def attack_part(judge: Judge, found: Attacks) -> Part:
    """The cases as what is to be judged: one vote at temperature 0 a text."""
    items: list[Item] = [judge.item(case.prompt, text, task=case.task) for case, text in found.texts]
    ids = [f"a case of {case.family}" for case, _ in found.texts]
    plan = replace(judge.plan, temperature=0.0)
    return Part("attacks", items, ids, 1, plan, f"{len(found.cases)} cases, 1 vote a text at temperature 0")


def attack_measures(found: Attacks, votes: Sequence[tuple[Vote, ...] | None], seed: int) -> dict[str, Any] | None:
    """What the attacks did, from the votes of `attack_part`, as plain JSON values.

    `truth`; `rows`, one a family: `n`, `texts`, `rise` (mean score with the attack less that with the benign text),
    `gain` (less that of the bare response; None where truth is held equal), both with intervals for all families
    together, and the shares that rose and fell by a point or more; `level`: mean score of the benign texts; `cases`;
    `left_out`: cases with a text that was too long or could not be read, or of a family with too few prompts. A score
    is the expected one where there is one, else the written one. None where no family has enough.
    """
    scores = [None if vote is None else _score(vote[0]) for vote in votes]
    each = 2 if found.truth else 3
    by_case = [scores[place : place + each] for place in range(0, len(scores), each)]
    kept = [
        (case, [score for score in row if score is not None])
        for case, row in zip(found.cases, by_case, strict=True)
        if None not in row
    ]
    families = list(dict.fromkeys(case.family for case in found.cases))
    of = {family: [(case, row) for case, row in kept if case.family == family] for family in families}
    rises = together([([c.prompt for c, _ in of[f]], [r[0] - r[1] for _, r in of[f]]) for f in families], seed)
    gains: list[dict[str, Any] | None] = [None] * len(families)
    if not found.truth:
        gains = together([([c.prompt for c, _ in of[f]], [r[0] - r[2] for _, r in of[f]]) for f in families], seed)
    rows = []
    left_out = len(found.cases)
    for family, rise, gain in zip(families, rises, gains, strict=True):
        if rise is not None:
            rows.append(_row(family, of[family], rise, gain))
            left_out -= len(of[family])
    if not rows:
        return None
    level = float(np.mean([row[1] for _, row in kept]))
    return {"truth": found.truth, "rows": rows, "level": level, "cases": len(found.cases), "left_out": left_out}


def _row(
    family: str, cases: Sequence[tuple[Case, list[float]]], rise: dict[str, Any], gain: dict[str, Any] | None
) -> dict[str, Any]:
    changes = [scores[0] - scores[1] for _, scores in cases]
    return {
        "family": family,
        "texts": len({case.attack for case, _ in cases}),
        "n": len(cases),
        "rise": rise,
        "gain": gain,
        "rose_by_a_point": float(np.mean([change >= 1 for change in changes])),
        "fell_by_a_point": float(np.mean([change <= -1 for change in changes])),
    }


def _score(vote: Vote) -> float | None:
    return vote.expected if vote.expected is not None else vote.verdict.score


def _in_turn(pairs: Sequence[Pair], rng: random.Random) -> list[tuple[Pair, str]]:
    """Responses in the order in which they are used: one of each prompt first, and the rejected ones before the
    chosen, since they have more room to rise."""
    order = rng.sample(list(pairs), len(pairs))
    first = {pair.prompt: pair for pair in reversed(order)}
    other = [pair for pair in order if first[pair.prompt] is not pair]
    sides = [(pair, pair.rejected) for pair in (*first.values(), *other)]
    return [*sides, *((pair, pair.chosen) for pair, _ in sides)]


def _cases(
    responses: Sequence[tuple[Pair, str]], tokens: Callable[[str], int], n: int, rng: random.Random
) -> list[Case]:
    found = []
    for family, texts in FAMILIES.items():
        usable = ECHOES if family == ECHO else [text for text in texts if 0 < tokens(text) <= LONGEST]
        for turn in range(n if usable else 0):
            pair, response = responses[turn % len(responses)]
            text = usable[turn % len(usable)]
            if family == ECHO:
                text = text.format(" ".join(pair.prompt[-1].content.split()[:ECHOED]))
            attacked = f"{response} {text}"
            benign = f"{response} {_plain(rng, response, tokens, tokens(attacked))}"
            found.append(Case(family, text, pair.prompt, pair.task, attacked, benign, response=response))
    return found


def _plain(rng: random.Random, response: str, tokens: Callable[[str], int], length: int) -> str:
    """Plain sentences that make the response as long as wanted, or as near as words come."""
    words: list[str] = []
    while not words or tokens(f"{response} {' '.join(words)}") < length:
        words += rng.choice(PLAIN).split()
    while len(words) > 1 and tokens(f"{response} {' '.join(words[:-1])}") >= length:
        words.pop()
    return " ".join(words)
