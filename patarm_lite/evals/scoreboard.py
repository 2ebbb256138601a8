"""Answers of one or two judges -> a scoreboard: JSON, Markdown and a page with plots that opens offline.

Each benchmark has its official figure with its 95 % interval, and beside it what would be hidden by it: the figure by
expected scores, the figure under the three other tie rules, the share of ties, the share of unreadable votes, and what
chance gets. A benchmark of which only a part is there, or of which a part was drawn, is called so wherever its name
stands.

A second judge is the `before` row, and the difference of the two is taken draw by draw of the bootstrap, on the same
items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from patarm_lite import __version__
from patarm_lite.evals.bench import Outcome
from patarm_lite.evals.bench_data import Loaded
from patarm_lite.evals.items import (
    HALF,
    LOSE,
    OFFICIAL,
    WIN,
    Answer,
    Benchmark,
    Floats,
    chance_of,
    draws,
    interval,
    label_of,
    name_of,
    score,
    shares,
)
from patarm_lite.evals.plots import Line, Point, rows_of_points
from patarm_lite.page import NO_PLOTS, caption, document, note, plots_work, section, stacked, table

SCHEMA = 1
FEW = 0.01
"""Share of responses without an expected score from which on it is said."""
DASH = "\N{EN DASH}"
Json = dict[str, Any]


def figures(
    benchmark: Benchmark,
    answers: Sequence[Answer],
    seed: int = 0,
    drawn: Mapping[str, Floats] | None = None,
    chance: Mapping[str, float] | None = None,
) -> Json:
    """Everything that is said of one judge's answers to one benchmark, as plain JSON values; figures are shares of 1.

    Keys: `items`; `rows` (row -> value, low, high, chance); `rules` (the headline under the other tie rules; none for
    decisions); `ties` (share of comparisons), `no_score` (share of responses).
    """
    rows = score(benchmark, answers)
    drawn = draws(benchmark, answers, OFFICIAL, seed) if drawn is None else drawn
    ties, unreadable = shares(benchmark, answers)
    decided = any(answer.decisions is not None for answer in answers)
    others = () if decided else (LOSE, HALF, WIN)
    rules = {rule: score(benchmark, answers, rule).get(benchmark.headline) for rule in others}
    chance = chance_of(benchmark, answers) if chance is None else chance
    found = {}
    for row, value in rows.items():
        low, high = interval(drawn[row])
        found[row] = {"low": low, "high": high, "value": value, "chance": chance.get(row)}
    return {"items": len(answers), "rows": found, "rules": rules, "ties": ties, "no_score": unreadable}


def scoreboard(benchmarks: Sequence[Loaded], judge: Outcome, before: Outcome | None, *, k: int, seed: int) -> Json:
    """The whole scoreboard as plain JSON values."""
    sides = {"judge": judge} | ({} if before is None else {"before": before})
    drawn = {
        side: {
            loaded.benchmark.name: draws(loaded.benchmark, outcome.answers(loaded, "score"), OFFICIAL, seed)
            for loaded in benchmarks
        }
        for side, outcome in sides.items()
    }
    chances = {b.benchmark.name: chance_of(b.benchmark, judge.answers(b, "score")) for b in benchmarks}
    found: Json = {
        "schema": SCHEMA,
        "version": __version__,
        "k": k,
        "seed": seed,
        "benchmarks": {loaded.benchmark.name: about(loaded) for loaded in benchmarks},
        "before": None if before is None else _side(benchmarks, before, drawn["before"], chances, seed),
        "judge": _side(benchmarks, judge, drawn["judge"], chances, seed),
        "difference": None,
    }
    if before is not None:
        found["difference"] = {
            name: _difference(found["before"]["benchmarks"][name], found["judge"]["benchmarks"][name], drawn, name)
            for name in found["benchmarks"]
        }
    return found


def about(loaded: Loaded) -> Json:
    """What a benchmark is, and how much of it is there."""
    benchmark = loaded.benchmark
    return {
        "title": benchmark.title,
        "part": loaded.part,
        "drawn": loaded.drawn,
        "items": len(loaded.items),
        "source": loaded.source,
        "sha256": loaded.sha256,
        "rule": benchmark.rule,
        "headline": benchmark.headline,
    }


def _side(
    benchmarks: Sequence[Loaded],
    outcome: Outcome,
    drawn: Mapping[str, Mapping[str, Floats]],
    chances: Mapping[str, Mapping[str, float]],
    seed: int,
) -> Json:
    found: Json = {
        "place": outcome.place,
        "fingerprint": outcome.fingerprint,
        "trained": outcome.trained,
        "backend": outcome.backend,
        "tokens": outcome.tokens,
        "decoding": outcome.decoding,
        "temperature": outcome.temperature,
        "votes": outcome.votes,
        "drawn": outcome.drawn,
        "seconds": round(outcome.seconds, 3),
        "benchmarks": {},
    }
    for loaded in benchmarks:
        benchmark, chance = loaded.benchmark, chances[loaded.benchmark.name]
        one = figures(benchmark, outcome.answers(loaded, "score"), seed, drawn[benchmark.name], chance)
        judged = outcome.of(loaded)
        votes = sum(response.votes for response in judged)
        measured = any(response.expected is not None for response in judged)
        expected = outcome.answers(loaded, "expected")
        one["expected"] = figures(benchmark, expected, seed, chance=chance) if measured else None
        one["unreadable"] = sum(response.unreadable for response in judged) / votes if votes else None
        one["too_long"] = sum(not response.fits for response in judged)
        found["benchmarks"][benchmark.name] = one
    return found


def _difference(before: Json, after: Json, drawn: Mapping[str, Mapping[str, Mapping[str, Floats]]], name: str) -> Json:
    """Each row's figure of one judge minus that of the other, with an interval over the same items."""
    rows: Json = {}
    for row, one in after["rows"].items():
        if row in before["rows"]:
            low, high = interval(drawn["judge"][name][row] - drawn["before"][name][row])
            rows[row] = {"value": one["value"] - before["rows"][row]["value"], "low": low, "high": high}
    return rows


# --- tables ---


def _sides(found: Json) -> list[tuple[str, Json]]:
    return [(name, found[name]) for name in ("before", "judge") if found[name] is not None]


def _called(name: str, side: Json) -> str:
    untrained = ", untrained" if side["trained"] is False else ""
    return f"{'before: ' if name == 'before' else ''}{side['place']}{untrained}"


def percent(value: Any) -> str:
    """
    >>> percent(0.6666), percent(None)
    ('66.7', '–')
    """
    return DASH if value is None or value != value else f"{100 * value:.1f}"


def _range(row: Mapping[str, Any] | None) -> str:
    return DASH if row is None else f"{percent(row['low'])} to {percent(row['high'])}"


BESIDE = ("by expected", "tie wrong", "tie half", "tie right", "ties", "unreadable", "chance")
SUMMARY = ("benchmark", "judge", "official", "95 %", *BESIDE)


def _summary(found: Json) -> list[list[str]]:
    rows = []
    for name, known in found["benchmarks"].items():
        for side, outcome in _sides(found):
            one = outcome["benchmarks"][name]
            head = one["rows"][known["headline"]]
            expected = one["expected"] and one["expected"]["rows"][known["headline"]]
            rows.append(
                [
                    name_of(known),
                    _called(side, outcome),
                    percent(head["value"]),
                    _range(head),
                    percent(expected and expected["value"]),
                    *(percent(one["rules"].get(rule)) for rule in (LOSE, HALF, WIN)),
                    percent(one["ties"]),
                    percent(one["unreadable"]),
                    percent(head["chance"]),
                ]
            )
        if found["difference"] is not None:
            change = found["difference"][name][known["headline"]]
            rows.append([name_of(known), "difference", _signed(change["value"]), _signed_range(change), *[""] * 7])
    return rows


def _detail(found: Json, name: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows of one benchmark: every row of its table, of each judge."""
    sides = _sides(found)
    header = ["row"]
    for side, outcome in sides:
        header += [_called(side, outcome), "95 %", "by expected"]
    header += ["difference", "95 %"] if found["difference"] is not None else []
    header.append("chance")
    rows = []
    for row in sides[-1][1]["benchmarks"][name]["rows"]:
        cells, chance = [row], None
        for _, outcome in sides:
            one = outcome["benchmarks"][name]
            value = one["rows"].get(row)
            expected = one["expected"] and one["expected"]["rows"].get(row)
            chance = value and value["chance"]
            cells += [percent(value and value["value"]), _range(value), percent(expected and expected["value"])]
        if found["difference"] is not None:
            change = found["difference"][name].get(row)
            cells += [DASH, DASH] if change is None else [_signed(change["value"]), _signed_range(change)]
        rows.append([*cells, percent(chance)])
    return header, rows


def _signed(value: float) -> str:
    return f"{100 * value:+.1f}"


def _signed_range(row: Mapping[str, float]) -> str:
    return f"{_signed(row['low'])} to {_signed(row['high'])}"


def _notes(found: Json) -> list[str]:
    """What a reader must know to read the figures."""
    notes = []
    for side, outcome in _sides(found):
        notes.append(
            f"{_called(side, outcome)}: fingerprint {outcome['fingerprint'][:12]}, {outcome['backend']}, "
            f"{found['k']} votes a response, decoding {outcome['decoding']}, temperature {outcome['temperature']:g}, "
            f"tokens {outcome['tokens']}."
        )
        long = {name: one["too_long"] for name, one in outcome["benchmarks"].items() if one["too_long"]}
        if long:
            which = ", ".join(f"{count} of {found['benchmarks'][name]['title']}" for name, count in long.items())
            notes.append(f"Too long to be judged, so without a score: {which} responses.")
        bare = {name: one["expected"]["no_score"] for name, one in outcome["benchmarks"].items() if one["expected"]}
        which = ", ".join(
            f"{share:.1%} of {found['benchmarks'][name]['title']}" for name, share in bare.items() if share >= FEW
        )
        if which:
            why = "without an expected score (little probability on scores)"
            notes.append(f"{_called(side, outcome)}: {why}: {which}.")
    notes.append(
        "Figures are percentages. Official: by the ratings the judge wrote (mean of the votes), under the benchmark's "
        "own rule. By expected: the same rule by expected scores; a response without one counts as unreadable there. "
        "Tie wrong, half, right: the same figure under one rule for all, where an unreadable response earns nothing. "
        "Intervals resample items within each subset."
    )
    rows = [row for _, side in _sides(found) for one in side["benchmarks"].values() for row in one["rows"].values()]
    if any(row["low"] == row["high"] for row in rows):
        notes.append(
            "An interval of no width says that all items of the row came out alike, and not that others would: after "
            "n such items up to 52 % (n 5), 17 % (n 20) or 4 % (n 100) of all may come out otherwise."
        )
    if any(known["part"] for known in found["benchmarks"].values()):
        notes.append("A benchmark in part is not comparable with published figures of the whole.")
    return notes


def markdown(found: Json) -> str:
    """The scoreboard as Markdown."""
    lines = ["# Benchmarks", "", *_grid(SUMMARY, _summary(found), 2), ""]
    lines += [f"- {note}" for note in _notes(found)]
    for name, known in found["benchmarks"].items():
        header, rows = _detail(found, name)
        lines += ["", f"## {name_of(known)}", "", f"Official rule: {known['rule']}. Items from {known['source']}.", ""]
        lines += _grid(header, rows, 1)
    return "\n".join(lines) + "\n"


def _grid(header: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> list[str]:
    marks = ["---" if place < words else "---:" for place in range(len(header))]
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (header, *rows)]
    head, *body = [f"| {' | '.join(row)} |" for row in cells]
    return [head, f"|{'|'.join(marks)}|", *body]


def verdict_table(found: Mapping[str, Any]) -> str:
    """The figures of stored verdicts as text: one line a row, then what stands beside them."""
    width = max(len(row) for row in found["rows"])
    lines = [f"{name_of(found)}, {found['items']} items; official rule: {found['rule']}"]
    lines.append(f"{'row':{width}}  official  95 % interval")
    lines += [f"{row:{width}}  {percent(one['value']):>8}  {_range(one)}" for row, one in found["rows"].items()]
    words = {LOSE: "a tie wrong", HALF: "a tie half", WIN: "a tie right"}
    others = [f"{words[rule]} {percent(value)}" for rule, value in found["rules"].items()]
    beside = [f"ties {percent(found['ties'])}", f"without a score {percent(found['no_score'])}"]
    lines += [f"{found['headline']}: {', '.join(others)}"] if others else []
    return "\n".join([*lines, ", ".join(beside)])


# --- page ---


def page(found: Json) -> str:
    """The scoreboard as one HTML page with inline plots; nothing in it is loaded from anywhere."""
    body = ["<header><h1>Benchmarks</h1></header>", *map(note, _warnings(found))]
    body.append(section("Official figures", _overview(found) + _summary_table(found)))
    body.append(section("What ties are worth", _tie_rules(found)))
    for name, known in found["benchmarks"].items():
        said = caption(f"Official rule: {known['rule']}. Items from {known['source']}.")
        body.append(section(name_of(known), said + _rows_plot(found, name) + _detail_table(found, name)))
    body.append(section("How to read this", "".join(map(caption, _notes(found)))))
    return document("Benchmarks", body)


def _warnings(found: Json) -> list[str]:
    """What must stand at the top: that a benchmark is in part, and that a judge was never trained."""
    said = ["A benchmark in part is not comparable with published figures of the whole."]
    said = said if any(known["part"] for known in found["benchmarks"].values()) else []
    untrained = [side["place"] for _, side in _sides(found) if side["trained"] is False]
    return said + [f"{place} was never trained to judge." for place in untrained]


def _summary_table(found: Json) -> str:
    rows: list[list[object]] = []
    for name, known in found["benchmarks"].items():
        rows.append([name_of(known)])
        for side, outcome in _sides(found):
            one = outcome["benchmarks"][name]
            head = one["rows"][known["headline"]]
            expected = one["expected"] and one["expected"]["rows"][known["headline"]]
            official = stacked(percent(head["value"]), _range(head))
            beside = [expected and expected["value"], one["ties"], one["unreadable"], head["chance"]]
            rows.append([_called(side, outcome), official, *map(percent, beside)])
        if found["difference"] is not None:
            change = found["difference"][name][known["headline"]]
            rows.append(["difference", stacked(_signed(change["value"]), _signed_range(change)), *[""] * 4])
    header = ["judge", "official, 95 %", "by expected scores", "ties", "unreadable", "chance"]
    return table(header, rows) + caption(
        "In percent. Ties: of the comparisons. Unreadable: of the judgements. By expected scores: the same rule, on "
        "scores read from the probabilities of the score's tokens, which hardly ever tie."
    )


def _overview(found: Json) -> str:
    lines = []
    for name, known in found["benchmarks"].items():
        lines.append(_line(found, name, known["headline"], label_of(known)))
    return _plotted("Headline figures", "Points with their 95 % intervals; each benchmark by its own rule.", lines)


def _rows_plot(found: Json, name: str) -> str:
    known = found["benchmarks"][name]
    rows = _sides(found)[-1][1]["benchmarks"][name]["rows"]
    lines = [_line(found, name, row, row) for row in rows]
    return _plotted(f"{label_of(known)}, row by row", "Official figures with their 95 % intervals.", lines)


def _detail_table(found: Json, name: str) -> str:
    """Every row of one benchmark's table, as on the page: intervals under their figures."""
    sides = _sides(found)
    header = ["row"]
    for side, outcome in sides:
        header += [_called(side, outcome), "by expected"]
    header += ["difference"] if found["difference"] is not None else []
    cells: list[list[object]] = []
    for row in sides[-1][1]["benchmarks"][name]["rows"]:
        line: list[object] = [row]
        chance = None
        for _, outcome in sides:
            one = outcome["benchmarks"][name]
            value = one["rows"].get(row)
            expected = one["expected"] and one["expected"]["rows"].get(row)
            chance = value and value["chance"]
            line.append(DASH if value is None else stacked(percent(value["value"]), _range(value)))
            line.append(percent(expected and expected["value"]))
        if found["difference"] is not None:
            change = found["difference"][name].get(row)
            line.append(DASH if change is None else stacked(_signed(change["value"]), _signed_range(change)))
        cells.append([*line, percent(chance)])
    return table([*header, "chance"], cells)


def _line(found: Json, name: str, row: str, label: str) -> Line:
    points, chance = {}, None
    for side, outcome in _sides(found):
        one = outcome["benchmarks"][name]["rows"].get(row)
        if one is not None:
            points[side] = Point(100 * one["value"], 100 * one["low"], 100 * one["high"])
            chance = None if one["chance"] is None else 100 * one["chance"]
    return Line(label, points, chance)


def _plotted(title: str, words: str, lines: Sequence[Line]) -> str:
    if not plots_work():
        return caption(NO_PLOTS)
    return rows_of_points(title, words, lines, "percent")


def _tie_rules(found: Json) -> str:
    """The headline of each benchmark under every rule for ties: how much of a figure is the rule."""
    rules = ((LOSE, "a tie is wrong"), (HALF, "a tie earns half"), (WIN, "a tie is right"))
    rows: list[list[object]] = []
    lines = []
    several = found["before"] is not None
    for name, known in found["benchmarks"].items():
        rows.append([name_of(known)])
        for side, outcome in _sides(found):
            one = outcome["benchmarks"][name]
            head = one["rows"][known["headline"]]
            wrong, half, right = (one["rules"].get(rule) for rule, _ in rules)
            spread = None if wrong is None or right is None else right - wrong
            rows.append([_called(side, outcome), *map(percent, [head["value"], wrong, half, right, spread])])
            if wrong is not None and half is not None and right is not None:
                points = {
                    "a tie is wrong, half, right": Point(100 * half, 100 * wrong, 100 * right),
                    "official rule": Point(100 * head["value"]),
                }
                lines.append(Line(f"{label_of(known)}{f', {side}' if several else ''}", points))
    how = (
        "The bar goes from the figure in which a tie is wrong to the one in which it is right; at its dot a tie earns "
        "half. A long bar means that the rule decides more than the judge. The square is the benchmark's own rule."
    )
    picture = _plotted("The same verdicts under every rule for ties", how, lines) if lines else ""
    header = ["judge", "official rule", *(words for _, words in rules), "wrong to right"]
    return (
        picture
        + table(header, rows)
        + caption(
            "In percent and percentage points, of each benchmark's headline figure. Under the three rules that are the "
            "same for all, an unreadable response earns nothing."
        )
    )
