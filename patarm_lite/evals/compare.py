"""Judges on the same items: paired differences with intervals, where they disagree, judgements side by side.

Every judge is compared with the first. Both accuracies of a draw come from the same prompts, so what makes a prompt
hard cancels out. The differences by kind of pair have intervals that hold for all kinds together
(`resampled.together`): of twenty ordinary ones, one excludes 0 by chance. Of finished `bench` folders there are the
scores of each item, and no judgements to show.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from patarm_lite import metrics
from patarm_lite.errors import UserError
from patarm_lite.evals.audit import earned, scores_of
from patarm_lite.evals.items import Answer, BenchItem, Benchmark, draws, interval, name_of, part_of, score
from patarm_lite.evals.resampled import CHANGE, figure, ratio, share_of, together
from patarm_lite.records import JudgedPair, Turn, Vote

Json = dict[str, Any]
Judgements = Callable[[int, str, str, int], Sequence[Vote] | None]
"""(number of the judge, benchmark, id of the item, place of the response) -> its votes; None where there are none."""
OUTCOMES = ("right", "tie", "wrong", "unreadable")
EXAMPLES = 6
"""Pairs shown for each two judges; items of each benchmark, half as many."""
LONGEST = 1500
"""Characters of one text shown."""
SLICES = 3
"""Kinds of pairs that are named first."""


# --- pairs ---


def compare_pairs(judges: Sequence[tuple[str, Sequence[JudgedPair]]], seed: int = 0) -> Json:
    """Judges on pairs, as plain JSON values.

    `judges`: place and accuracy of each. `against`: each other judge against the first: `difference` of accuracy,
    `outcomes` (how the first judged a pair -> how the other did -> pairs), `disagree` (share of pairs with another
    outcome), `better` and `worse` (pairs that the other one alone judges right, and the first alone), `where`
    (difference in each kind of pair; intervals for all kinds together), `correlation` of their score gaps, `examples`:
    the pairs with another outcome whose gaps are furthest apart, with both judgements.

    Raises:
        UserError: they did not judge the same pairs.
    """
    first, base = judges[0]
    found: Json = {"kind": "pairs", "n": len(base), "judges": [], "against": []}
    for place, judged in judges:
        scores, by = scores_of(judged)
        groups = [j.pair.prompt for j in judged]
        value = share_of(groups, earned(scores), np.ones(len(scores)), len(scores), seed)
        found["judges"].append({"place": place, "by": by, "accuracy": value, "unreadable": metrics.unreadable(judged)})
    for place, judged in judges[1:]:
        if [j.pair for j in judged] != [j.pair for j in base]:
            raise UserError(f"{place} and {first} did not judge the same pairs; judge both with the same pair file")
        found["against"].append({"a": first, "b": place, **_against(base, judged, seed)})
    return found


def _against(a: Sequence[JudgedPair], b: Sequence[JudgedPair], seed: int) -> Json:
    first, second = scores_of(a)[0], scores_of(b)[0]
    change = np.array(earned(second)) - np.array(earned(first))
    prompts = [j.pair.prompt for j in a]
    outcomes = [(_outcome(x), _outcome(y)) for x, y in zip(first, second, strict=True)]
    moved = Counter(outcomes)
    gaps = [(_gap(x), _gap(y)) for x, y in zip(first, second, strict=True)]
    known = [i for i, (x, y) in enumerate(gaps) if x is not None and y is not None]
    apart = {i: abs((gaps[i][1] or 0.0) - (gaps[i][0] or 0.0)) for i in known}
    differing = [i for i in sorted(known, key=lambda i: (-apart[i], i)) if outcomes[i][0] != outcomes[i][1]]
    return {
        "n": len(a),
        "difference": figure(prompts, [change, np.ones(len(change))], ratio, len(change), seed, CHANGE),
        "disagree": sum(x != y for x, y in outcomes) / len(a),
        "better": sum(y == "right" != x for x, y in outcomes),
        "worse": sum(x == "right" != y for x, y in outcomes),
        "correlation": metrics.spearman([gaps[i][0] or 0.0 for i in known], [gaps[i][1] or 0.0 for i in known]),
        "outcomes": {x: {y: moved[x, y] for y in OUTCOMES} for x in OUTCOMES},
        "where": _where(a, change, seed),
        "examples": [_example(a[i], b[i], first[i], second[i]) for i in differing[:EXAMPLES]],
    }


def _where(judged: Sequence[JudgedPair], change: Any, seed: int) -> Json:
    """The difference in each kind of pair, None where its prompts are too few for an interval; `n` of each."""
    place = {id(j): number for number, j in enumerate(judged)}
    rows = {name: [place[id(j)] for j in part] for name, part in metrics.slices(judged).items()}
    samples = [([judged[i].pair.prompt for i in of], [float(change[i]) for i in of]) for of in rows.values()]
    found = together(samples, seed)
    return {name: {"n": len(of), "difference": one} for (name, of), one in zip(rows.items(), found, strict=True)}


def _gap(sides: tuple[float | None, float | None]) -> float | None:
    return None if sides[0] is None or sides[1] is None else sides[0] - sides[1]


def _outcome(sides: tuple[float | None, float | None]) -> str:
    gap = _gap(sides)
    return "unreadable" if gap is None else "right" if gap > 0 else "tie" if gap == 0 else "wrong"


def _example(a: JudgedPair, b: JudgedPair, first: tuple[Any, Any], second: tuple[Any, Any]) -> Json:
    return {
        "id": a.pair.id,
        "a": _outcome(first),
        "b": _outcome(second),
        "prompt": _prompt(a.pair.prompt),
        "responses": [
            _response(side, getattr(a.pair, side), (first[place], getattr(a, side)), (second[place], getattr(b, side)))
            for place, side in enumerate(metrics.SIDES)
        ],
    }


def _prompt(turns: Sequence[Turn]) -> str:
    if len(turns) == 1:
        return _cut(turns[0].content)
    return _cut("\n".join(f"{turn.role}: {turn.content}" for turn in turns))


def _response(
    name: str, text: str, a: tuple[float | None, Sequence[Vote] | None], b: tuple[float | None, Sequence[Vote] | None]
) -> Json:
    """A response with what two judges make of it: mean score, and the first of the votes' judgements."""
    found: Json = {"name": name, "text": _cut(text)}
    for who, (value, votes) in (("a", a), ("b", b)):
        found[who] = {
            "score": value,
            "votes": len(votes) if votes else 0,
            "judgement": _cut(votes[0].text) if votes else None,
        }
    return found


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … ({len(text):,} characters in all)"


# --- benchmarks ---


def compare_answers(
    judges: Sequence[tuple[str, list[tuple[Benchmark, list[Answer]]]]],
    seed: int = 0,
    judgements: Judgements | None = None,
    parts: Mapping[str, str | None] | None = None,
) -> Json:
    """Judges on benchmarks: each benchmark's headline, the difference to the first judge, and where they disagree.

    What is looked at are comparisons of a right with a wrong response (of the two, where a label says which is better):
    `comparisons` of them, of which `other_order` come out otherwise than with the first judge, in all and by `subset`.
    `examples`: of each benchmark the items in which one moved furthest, with its two responses.

    Args:
        judgements: where to find the votes; None: there are scores only.
        parts: what there is of each benchmark, in words, None where it is whole; left out: as `part_of` finds it.

    Raises:
        UserError: they did not judge the same items.
    """
    found: Json = {"kind": "benchmarks", "judgements": judgements is not None, "judges": [], "against": []}
    first, base = judges[0]
    for place, answers in judges:
        heads = {benchmark.name: score(benchmark, given)[benchmark.headline] for benchmark, given in answers}
        found["judges"].append({"place": place, "figures": heads})
    for number, (place, answers) in enumerate(judges[1:], 1):
        rows, examples = {}, []
        for (benchmark, before), (other, after) in zip(base, answers, strict=True):
            if benchmark.name != other.name or [x.item.id for x in before] != [y.item.id for y in after]:
                raise UserError(f"{place} and {first} are not of the same items of {benchmark.title}; run both on them")
            if [x.decisions is None for x in before] != [y.decisions is None for y in after]:
                raise UserError(f"of {benchmark.title} {place} and {first} hold scores and decisions; give one kind")
            part = part_of(benchmark, [x.item for x in before]) if parts is None else parts[benchmark.name]
            rows[benchmark.name] = {"part": part, **_benchmark(benchmark, before, after, seed)}
            examples += _items(benchmark, before, after, number, judgements)
        found["against"].append({"a": first, "b": place, "benchmarks": rows, "examples": examples})
    return found


def _benchmark(benchmark: Benchmark, before: Sequence[Answer], after: Sequence[Answer], seed: int) -> Json:
    head = benchmark.headline
    drawn = [draws(benchmark, given, seed=seed)[head] for given in (before, after)]
    low, high = interval(drawn[1] - drawn[0])
    subsets: dict[str, Json] = {}
    for x, y in zip(before, after, strict=True):
        row = subsets.setdefault(x.item.subset, {"items": 0, "comparisons": 0, "other_order": 0})
        row["items"] += 1
        row["comparisons"] += len(_order(x))
        row["other_order"] += sum(was != now for was, now in zip(_order(x), _order(y), strict=True))
    return {
        "title": benchmark.title,
        "value": score(benchmark, after)[head] - score(benchmark, before)[head],
        "low": low,
        "high": high,
        "n": len(before),
        "comparisons": sum(row["comparisons"] for row in subsets.values()),
        "other_order": sum(row["other_order"] for row in subsets.values()),
        "subset": subsets,
    }


def _twos(answer: Answer) -> list[tuple[int, int]]:
    """Every right response with every wrong one."""
    right = range(answer.item.correct)
    return [(i, j) for i in right for j in range(answer.item.correct, len(answer.scores))]


def _order(answer: Answer) -> list[object]:
    """How each comparison came out; decisions as they are."""
    return list(answer.decisions) if answer.decisions is not None else [_above(answer, two) for two in _twos(answer)]


def _items(
    benchmark: Benchmark,
    before: Sequence[Answer],
    after: Sequence[Answer],
    number: int,
    judgements: Judgements | None,
) -> list[Json]:
    """The items in which a comparison that came out otherwise moved furthest."""
    rows = []
    for place, (x, y) in enumerate(zip(before, after, strict=True)):
        changes = _changes(x, y)
        if changes:
            apart, two = max(changes)
            rows.append((-apart, place, two))
    found = []
    for _, place, two in sorted(rows)[: EXAMPLES // 2]:
        x, y = before[place], after[place]
        responses = [
            _response(
                f"response {i + 1} of {len(x.scores)}",
                x.item.responses[i] if x.item.responses else "",
                (x.scores[i], judgements(0, benchmark.name, x.item.id, i) if judgements else None),
                (y.scores[i], judgements(number, benchmark.name, x.item.id, i) if judgements else None),
            )
            for i in two
        ]
        found.append(
            {
                "benchmark": benchmark.name,
                "id": f"{benchmark.title}, {x.item.id}",
                "a": _above(x, two),
                "b": _above(y, two),
                "truth": _truth(benchmark, x.item),
                "prompt": _prompt(x.item.prompt) if x.item.prompt else "",
                "responses": responses,
            }
        )
    return found


def _changes(x: Answer, y: Answer) -> list[tuple[float, tuple[int, int]]]:
    """How far the gap of two responses moved from one judge to the other, for each two that came out otherwise."""
    found = []
    for i, j in _twos(x):
        before, after = (_gap((answer.scores[i], answer.scores[j])) for answer in (x, y))
        if before is not None and after is not None and np.sign(before) != np.sign(after):
            found.append((abs(after - before), (i, j)))
    return found


def _above(answer: Answer, two: tuple[int, int]) -> str:
    gap = _gap((answer.scores[two[0]], answer.scores[two[1]]))
    if gap is None:
        return "unreadable"
    return "tie" if gap == 0 else f"response {two[gap < 0] + 1} higher"


def _truth(benchmark: Benchmark, item: BenchItem) -> str:
    """Which responses are right, in words."""
    if item.label and benchmark.name != "rewardbench2":
        return f"label {item.label}"
    return f"right: response 1 to {item.correct}" if item.correct > 1 else "right: response 1"


@dataclass(frozen=True, slots=True)
class Finished:
    """What a folder of `bench` holds: the answers, the SHA-256 of each benchmark's items, what there is of each (see
    `Loaded.part`), and how was decoded."""

    answers: list[tuple[Benchmark, list[Answer]]]
    items: Mapping[str, str]
    parts: Mapping[str, str | None]
    decoding: str


def read_bench(folder: Path) -> Finished:
    """The answers in a folder that `bench -o` wrote.

    Raises:
        UserError: no such folder, or a damaged one.
    """
    from patarm_lite.evals.bench_data import benchmark_named
    from patarm_lite.evals.stored import read_answers

    try:
        known = json.loads((folder / "bench.json").read_text(encoding="utf-8"))
        items = {name: str(one["sha256"]) for name, one in known["benchmarks"].items()}
        parts = {name: None if one["part"] is None else str(one["part"]) for name, one in known["benchmarks"].items()}
        decoding = str(known["judge"]["decoding"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{folder} has no bench.json that can be read; give a folder that 'patarm-lite bench -o' wrote"
        ) from None
    benchmarks = [benchmark_named(name) for name in items]
    answers = [(one, read_answers(one, folder / f"verdicts-{one.name}.jsonl")) for one in benchmarks]
    return Finished(answers, items, parts, decoding)


# --- tables ---


def rendered(found: Json, decoding: Sequence[str]) -> Json:
    """The comparison with `about`, `header`, `rows` for a table, and `said`: where the judges disagree, in words.

    Args:
        decoding: of each judge: constrained decoding hides unreadable judgements.
    """
    said_how = ", ".join(f"{one['place']} {how}" for one, how in zip(found["judges"], decoding, strict=True))
    about = f"decoding: {decoding[0] if len(set(decoding)) == 1 else said_how}"
    judges = [{**one, "decoding": how} for one, how in zip(found["judges"], decoding, strict=True)]
    found = {**found, "judges": judges}
    if found["kind"] == "pairs":
        changes = [None, *(one["difference"] for one in found["against"])]
        rows = [
            [one["place"], _span(one["accuracy"]), _span(change, sign=True), f"{one['unreadable']:.1%}"]
            for one, change in zip(found["judges"], changes, strict=True)
        ]
        header = ["judge", "accuracy in %, 95 %", "difference to the first in points, 95 %", "unreadable"]
        said = [sentence for one in found["against"] for sentence in _said_of_pairs(one)]
        return {
            **found,
            "about": f"{found['n']} pairs, judged by all; {about}",
            "header": header,
            "rows": rows,
            "said": said,
        }
    titles = {name: name_of(row) for name, row in found["against"][0]["benchmarks"].items()}
    rows = []
    for name in found["judges"][0]["figures"]:
        for place, one in enumerate(found["judges"]):
            change = found["against"][place - 1]["benchmarks"][name] if place else None
            moved = f"{change['other_order']} of {change['comparisons']}" if change else ""
            rows.append(
                [titles[name], one["place"], f"{100 * one['figures'][name]:.1f}", _span(change, sign=True), moved]
            )
    points = "difference to the first in points, 95 %"
    header = ["benchmark", "judge", "official in %", points, "comparisons that came out otherwise"]
    said = [sentence for one in found["against"] for sentence in _said_of_items(one)]
    return {**found, "about": f"the same items of benchmarks; {about}", "header": header, "rows": rows, "said": said}


def _said_of_pairs(one: Mapping[str, Any]) -> list[str]:
    n = one["n"]
    found = [
        f"{one['b']} against {one['a']}: another outcome in {round(one['disagree'] * n)} of {n} pairs; it alone is "
        f"right in {one['better']}, {one['a']} alone in {one['worse']}."
    ]
    known = [(name, row["difference"]) for name, row in one["where"].items() if row["difference"]]
    apart = sorted(known, key=lambda row: -abs(row[1]["value"]))[:SLICES]
    if apart:
        named = "; ".join(f"{name} {_span(row, sign=True)}, n {row['n']}" for name, row in apart)
        found.append(f"Furthest apart by kind of pair, in points (95 % for all kinds together): {named}.")
    return [*found, *map(_said_of_example, one["examples"][:SLICES])]


def _said_of_items(one: Mapping[str, Any]) -> list[str]:
    found = []
    for name, row in one["benchmarks"].items():
        subsets = sorted(row["subset"].items(), key=lambda item: -_share(item[1]))
        named = ", ".join(f"{subset} {two['other_order']} of {two['comparisons']}" for subset, two in subsets[:SLICES])
        more = f"; most in {named}" if len(subsets) > 1 and row["other_order"] else ""
        found.append(
            f"{name_of(row)}, {one['b']} against {one['a']}: {row['other_order']} of {row['comparisons']} comparisons "
            f"of a right with a wrong response came out otherwise{more}."
        )
        found += [_said_of_example(example) for example in one["examples"] if example["benchmark"] == name][:1]
    return found


def _share(row: Mapping[str, Any]) -> float:
    return float(row["other_order"] / max(1, row["comparisons"]))


def _said_of_example(example: Mapping[str, Any]) -> str:
    scores = [
        " against ".join("none" if r[who]["score"] is None else f"{r[who]['score']:.2f}" for r in example["responses"])
        for who in ("a", "b")
    ]
    about = " ".join(example["prompt"].split())
    about = f": {about[:80]}{'…' if len(about) > 80 else ''}" if about else ""
    return f"e.g. {example['id']}: {example['a']} ({scores[0]}), then {example['b']} ({scores[1]}){about}"


def markdown(found: Json) -> str:
    """A comparison that was `rendered` as text: the table, then where the judges disagree."""
    lines = [found["header"], ["---"] * len(found["header"]), *found["rows"]]
    table = [f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |" for line in lines]
    return "\n".join([*table, "", found["about"], *(f"- {sentence}" for sentence in found["said"])])


def _span(row: Mapping[str, Any] | None, sign: bool = False) -> str:
    if row is None:
        return ""
    value, low, high = (f"{100 * row[key]:{'+' if sign else ''}.1f}" for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"
