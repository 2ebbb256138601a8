"""An audit or a comparison as one HTML page that opens offline: findings first, then plots and tables.

Texts of others are escaped and the page's policy lets nothing load (`page.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from patarm_lite.evals.audit_findings import ORDER, raises_the_score
from patarm_lite.evals.items import label_of, name_of
from patarm_lite.evals.plots import Line, Point, legend, rows_of_points
from patarm_lite.page import (
    FIRST,
    MUTED,
    NO_PLOTS,
    SECOND,
    Html,
    caption,
    chart,
    document,
    escape,
    note,
    plot,
    plots_work,
    quoted,
    section,
    stacked,
    table,
)

WORDS = {"problem": "problem", "warning": "warning", "fine": "fine", "unknown": "not measured"}
NONE = "\N{EN DASH}"


def audit_page(found: Mapping[str, Any]) -> str:
    """The page of an audit."""
    pairs = f"{found['pairs']} pairs of {found['prompts']} prompts"
    facts = [
        found["place"],
        f"fingerprint {found['fingerprint'][:12]}",
        pairs + (f" from {found['source']}" if found["source"] else ""),
        f"{found['votes']} votes a response at temperature {found['temperature']:g}",
        f"decoding {found['decoding']}",
        f"scores: {found['by']}",
    ]
    counts = Counter(one["severity"] for one in found["findings"])
    told = ", ".join(f"{counts[severity]} {WORDS[severity]}" for severity in ORDER if counts[severity])
    body = [f"<header><h1>Audit of a judge</h1><p class=facts>{escape(' · '.join(facts))}</p></header>"]
    body += [note(sentence) for sentence in found["notes"]]
    body.append(section(f"Findings: {told}", _findings(found["findings"])))
    body.append(section("Plots", _plots(found)))
    body.append(section("Length and style", _leaning(found["leaning"])))
    body.append(section("Attacks", _attacks(found["attacks"])))
    body.append(section("Wrong labels", _noise(found["label_noise"])))
    body.append(section("Suspect labels", _suspects(found["label_noise"]["suspects"])))
    body.append(section("Cost", _cost(found["cost"])))
    return document("Audit of a judge", body)


def _findings(rows: Sequence[Mapping[str, Any]]) -> str:
    cells = [
        [
            Html(f"<b>{escape(row['about'])}</b><br><span class={row['severity']}>{WORDS[row['severity']]}</span>"),
            Html(f"{escape(row['sentence'])} <b>{escape(row['todo'])}</b>"),
        ]
        for row in rows
    ]
    return table(["about", "what was found, and what to do"], cells, 2) + caption(
        "Length and style are five tests and attacks a dozen: the intervals of each group hold for all of it together, "
        "so that of all audits of a judge without such a flaw one in twenty raises a false alarm there. What counts as "
        "a problem is a convention."
    )


# --- plots ---


def _plots(found: Mapping[str, Any]) -> str:
    if not plots_work():
        return caption(NO_PLOTS)
    small = [_scores(found["distribution"]), _reliability(found["reliability"]), _sides(found["leaning"])]
    small.append(_noise_curve(found["label_noise"]))
    return f"<div class=charts>{''.join(small)}</div>"


def _scores(row: Mapping[str, Any]) -> str:
    counts = {int(score): n for score, n in row["counts"].items()}

    def draw(axes: Any) -> None:
        axes.bar(list(counts), list(counts.values()), color=FIRST, width=0.8)
        axes.set_xticks(list(counts))
        axes.set_xlabel("score written")
        axes.set_ylabel("judgements")

    words = ", ".join(f"{score}: {n}" for score, n in counts.items())
    picture = plot("audit scores", (4.4, 2.8), draw, lambda: f"Scores given. {words}.", True)
    return chart("Scores given", "How many judgements end with each score.", picture)


def _reliability(row: Mapping[str, Any] | None) -> str:
    if row is None or not row["bins"]:
        return ""
    bins = row["bins"]

    def draw(axes: Any) -> None:
        axes.plot([0.5, 1], [0.5, 1], color=MUTED, linewidth=0.9, linestyle="--")
        _with_intervals(axes, [one["said"] for one in bins], [one["right"] for one in bins])
        axes.set_xlim(0.47, 1.02)
        axes.set_ylim(-0.03, 1.05)
        axes.set_xlabel("probability that the fit gave it")
        axes.set_ylabel("share that was preferred")

    words = ", ".join(f"said {b['said']:.2f}, was {b['right']['value']:.2f} of {b['right']['n']}" for b in bins)
    picture = plot("audit reliability", (4.4, 2.8), draw, lambda: f"Gap of scores and preference. {words}.", True)
    told = (
        "How often the response with the higher score was the preferred one, by the probability that a fit on other "
        "pairs gave it. On the dashed line the two agree."
    )
    return chart("What a gap between scores means", told, picture)


def _sides(rows: Sequence[Mapping[str, Any]]) -> str:
    both = [row for row in rows if row["more"] and row["fewer"]]
    if not both:
        return ""

    def draw(axes: Any) -> None:
        for shift, key, colour, hatch in ((-0.2, "more", FIRST, ""), (0.2, "fewer", SECOND, "//")):
            axes.bar(
                [place + shift for place in range(len(both))],
                [row[key]["value"] for row in both],
                0.36,
                color=colour,
                hatch=hatch,
                edgecolor=MUTED,
                linewidth=0,
                label=f"preferred one has {key}",
            )
        axes.axhline(0.5, color=MUTED, linewidth=0.9, linestyle="--", label="chance")
        axes.set_xticks(range(len(both)), [row["feature"].replace(" ", "\n") for row in both], fontsize=8)
        axes.set_ylim(0, 1.03)
        axes.set_ylabel("accuracy")
        legend(axes, 2)

    words = ", ".join(f"{r['feature']} {r['more']['value']:.2f} and {r['fewer']['value']:.2f}" for r in both)
    told = f"Accuracy by length and style, more and fewer. {words}."
    picture = plot("audit sides", (4.4, 2.8), draw, lambda: told, True)
    why = "A judge that follows a feature alone is right where the preferred response has more of it, else wrong."
    return chart("Accuracy by length and style", why, picture)


def _noise_curve(row: Mapping[str, Any]) -> str:
    known = [one for one in row["rows"] if one["true"] is not None]

    def draw(axes: Any) -> None:
        shares = [100 * one["noise"] for one in known]
        every, ceiling = [100 * one["noise"] for one in row["rows"]], [one["ceiling"] for one in row["rows"]]
        axes.plot(every, ceiling, color=MUTED, linewidth=0.9, linestyle="--", label="a perfect judge on such labels")
        _with_intervals(axes, shares, [one["true"] for one in known], "its accuracy against right labels")
        axes.set_xlabel("labels that are wrong, %")
        axes.set_ylabel("accuracy")
        axes.set_ylim(0, 1.05)
        legend(axes, 1)

    words = ", ".join(f"{one['noise']:.0%}: {one['true']['value']:.2f}" for one in known)
    picture = plot("audit noise", (4.4, 2.8), draw, lambda: f"True accuracy by share of wrong labels. {words}.", True)
    why = "What the measured accuracy would mean, and how wide its interval gets."
    return chart("If labels are wrong", why, picture)


def _with_intervals(axes: Any, x: Sequence[float], rows: Sequence[Mapping[str, Any]], label: str | None = None) -> None:
    y = [row["value"] for row in rows]
    below = [max(0.0, row["value"] - row["low"]) for row in rows]
    above = [max(0.0, row["high"] - row["value"]) for row in rows]
    axes.errorbar(x, y, yerr=[below, above], fmt="o", color=FIRST, markersize=5, capsize=3, label=label)


# --- tables ---


def _leaning(rows: Sequence[Mapping[str, Any]]) -> str:
    shares, correlations = ("follows", "labels", "excess", "more", "fewer"), ("correlation", "partial")
    cells = []
    for row in rows:
        figures = [_figure(row[key]) for key in shares] + [_figure(row[key], 2, True) for key in correlations]
        cells.append([row["feature"], row["n"], *figures])
    header = [
        "feature",
        "pairs",
        "judge prefers more",
        "labels prefer more",
        "difference",
        "accuracy, more",
        "accuracy, fewer",
        "correlation",
        "at equal quality",
    ]
    return table(header, cells) + caption(
        "Shares in percent. Pairs: readable ones that differ in the feature. Judge and labels: share of them in which "
        "they prefer the response with more. Accuracy: where the preferred response has more of it, or fewer. "
        "Correlation: rank correlation of score and feature over responses; at equal quality: with the true quality "
        "taken out, where the pairs state it. The intervals of the difference and at equal quality hold for all "
        "features together."
    )


def _attacks(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    rows = found["rows"]
    header = ["family", "texts", "cases", "above the benign text"]
    header += [] if found["truth"] else ["above the bare response"]
    header += ["rose by a point", "fell by a point"]
    cells = [
        [
            row["family"],
            row["texts"],
            row["n"],
            _figure(row["rise"], 2, True),
            *([] if found["truth"] else [_figure(row["gain"], 2, True)]),
            f"{row['rose_by_a_point']:.0%}",
            f"{row['fell_by_a_point']:.0%}",
        ]
        for row in rows
    ]
    truth = (
        "Both texts meet the same of what the prompt asks for, so the rise is what the attack did."
        if found["truth"]
        else "True quality is not known here, and a judge may honestly mislike the benign text; so an attack counts "
        "only where the score rises above the bare response's too."
    )
    left = f" {found['left_out']} of {found['cases']} cases were left out." if found["left_out"] else ""
    words = (
        "Change of the score, in points of 10, where a response gets an attack at its end: against a benign text as "
        f"long. {truth} Intervals hold for all families together.{left}"
    )
    if not plots_work():
        return table(header, cells) + caption(words)
    lines = [_attack_line(row) for row in rows]
    how = "Red diamonds: surely above 0." if any(map(raises_the_score, rows)) else "No family is surely above 0."
    picture = rows_of_points("Attacks by family", how, lines, "change of the score, points", zero=0.0, digits=2)
    return picture + table(header, cells) + caption(words)


def _attack_line(row: Mapping[str, Any]) -> Line:
    sure = raises_the_score(row)
    points = {"above the benign text": _point(row["rise"], sure)}
    if row["gain"] is not None:
        points["above the bare response"] = _point(row["gain"], sure)
    return Line(row["family"], points)


def _point(row: Mapping[str, Any], flagged: bool = False, scale: float = 1.0) -> Point:
    return Point(scale * row["value"], scale * row["low"], scale * row["high"], flagged)


def _noise(found: Mapping[str, Any]) -> str:
    cells = [
        [
            f"{row['noise']:.0%}",
            _figure(row["flipped"]),
            f"{100 * row['ceiling']:.0f}",
            "impossible" if row["true"] is None else _figure(row["true"]),
        ]
        for row in found["rows"]
    ]
    header = [
        "wrong labels",
        "accuracy, if so many of these labels were flipped",
        "a perfect judge's",
        "its true accuracy, if so many are wrong",
    ]
    flipped = "all pairs of a prompt together" if found["by"] == "prompt" else "each pair by itself"
    return table(header, cells) + caption(
        f"In percent. Flipped: at random, {flipped}; mean over 2,000 draws and where 95 % of them lie. True: what the "
        "measured accuracy would mean against right labels, with its 95 % interval over prompts; impossible where no "
        f"judge could have been measured so. {found['contradictions']} of {found['asked']} comparisons are labelled "
        "both ways."
    )


def _suspects(found: Mapping[str, Any]) -> str:
    if not found["listed"]:
        return caption("There is no pair in which every vote contradicts the label.")
    cells = [[row["id"] or NONE, f"{row['gap']:.1f}", row["least"], row["votes"]] for row in found["listed"]]
    cards = "".join(
        f"<details><summary>pair {escape(row['id'] or NONE)}</summary>"
        f"{''.join(quoted(name, row[name]) for name in ('prompt', 'chosen', 'rejected'))}</details>"
        for row in found["listed"]
    )
    listed = len(found["listed"])
    which = f"the {listed} surest of {found['contradicted']}" if listed < found["contradicted"] else f"all {listed}"
    words = (
        f"Pairs in which every vote scores the rejected response higher: {which}, of {found['n']} pairs. If the labels "
        f"of those listed are wrong, its accuracy is {_percent(found['if_listed'])}; if those of all "
        f"{found['contradicted']} are, {_percent(found['if_all'])}. Whether the label is wrong or the judge, this "
        "can't tell: read them."
    )
    header = ["pair", "gap, mean over votes, points", "smallest gap, points", "votes"]
    return caption(words) + table(header, cells) + cards


def _cost(found: Mapping[str, Any]) -> str:
    thousand = found["thousand"]
    rows = [
        ["tokens read (the judging prompt)", f"{found['prompt_tokens']:,.0f}", f"{thousand['prompt_tokens']:,.0f}"],
        ["tokens written, mean", f"{found['tokens']:,.1f}", f"{thousand['tokens']:,.0f}"],
        ["tokens written, in nine of ten at most", f"{found['tokens_90']:,.0f}", ""],
    ]
    if found["seconds"] is not None:
        rows.append(["time", f"{found['seconds']:.3g} s", f"{thousand['minutes']:,.3g} min"])
    timed = (
        f"Time: of {found['drawn']:,} verdicts drawn in this run, those drawn at once sharing it."
        if found["seconds"] is not None
        else "Time is not measured: the votes were in the store already. --no-store draws them anew."
    )
    return table(["", "one verdict", "1,000 verdicts"], rows) + caption(
        f"The votes on one response share its judging prompt. {timed}"
    )


def _percent(row: Mapping[str, Any]) -> str:
    return f"{100 * row['value']:.1f} % ({100 * row['low']:.1f} to {100 * row['high']:.1f})"


def _figure(row: Mapping[str, Any] | None, digits: int | None = None, sign: bool = False) -> object:
    """A value over its interval: in percent, or (with `digits`) as it is."""
    if row is None:
        return NONE
    scale, places = (100, 1) if digits is None else (1, digits)
    value, low, high = (
        f"{round(scale * row[key], places) + 0.0:{'+' if sign else ''}.{places}f}" for key in ("value", "low", "high")
    )
    return stacked(value, f"{low} to {high}")


# --- comparison ---


def compare_page(found: Mapping[str, Any]) -> str:
    """The page of a comparison that was `rendered`."""
    body = [f"<header><h1>Judges compared</h1><p class=facts>{escape(found['about'])}</p></header>"]
    if found.get("left_out"):
        body.append(note(f"{found['left_out']} pairs are too long for a judge and were left out."))
    body.append(section("Figures", _figures(found)))
    for one in found["against"]:
        body.append(f"<h2>{escape(one['b'])} against {escape(one['a'])}</h2>")
        body += _against_on_pairs(one) if found["kind"] == "pairs" else _against_on_items(one)
        cards = "".join(_card(one, example) for example in one["examples"])
        why = "" if found.get("judgements", True) else " Finished folders hold scores and no judgements."
        shown = f"The {len(one['examples'])} furthest apart among those with another outcome.{why}"
        body.append(section("Side by side", caption(shown) + cards) if cards else caption("They agree everywhere."))
    return document("Judges compared", body)


def _figures(found: Mapping[str, Any]) -> str:
    """What each judge gets, and its difference to the first."""
    if found["kind"] == "pairs":
        changes = [None, *(one["difference"] for one in found["against"])]
        rows: list[list[object]] = [
            [one["place"], _figure(one["accuracy"]), _figure(change, sign=True), f"{one['unreadable']:.1%}"]
            for one, change in zip(found["judges"], changes, strict=True)
        ]
        return table(["judge", "accuracy, %", "difference to the first, points", "unreadable"], rows)
    rows = []
    for name in found["judges"][0]["figures"]:
        rows.append([name_of(found["against"][0]["benchmarks"][name])])
        for place, one in enumerate(found["judges"]):
            change = found["against"][place - 1]["benchmarks"][name] if place else None
            rows.append([one["place"], f"{100 * one['figures'][name]:.1f}", _figure(change, sign=True)])
    return table(["judge", "official figure, %", "difference to the first, points"], rows)


def _against_on_pairs(one: Mapping[str, Any]) -> list[str]:
    n = one["n"]
    words = (
        f"Another outcome in {round(one['disagree'] * n)} of {n} pairs. {one['b']} alone is right in {one['better']}, "
        f"{one['a']} alone in {one['worse']}."
    )
    names = list(one["outcomes"])
    moved = [[f"first: {was}", *(one["outcomes"][was][now] for now in names)] for was in names]
    lines = [
        Line(f"{name} (n {row['n']})", {"difference": _point(row["difference"], _apart(row), 100)})
        for name, row in one["where"].items()
        if row["difference"]
    ]
    found = [caption(words), table(["pairs", *(f"other: {now}" for now in names)], moved)]
    if lines and plots_work():
        how = "Accuracy of the second less that of the first; the intervals hold for all kinds together."
        title = f"Where they differ: {one['b']}"
        found.append(rows_of_points(title, how, lines, "difference, percentage points", zero=0.0))
    rows = [[name, row["n"], _figure(row["difference"], sign=True)] for name, row in one["where"].items()]
    return [*found, table(["kind of pair", "pairs", "difference, points"], rows)]


def _apart(row: Mapping[str, Any]) -> bool:
    return bool(row["difference"]["low"] > 0 or row["difference"]["high"] < 0)


def _against_on_items(one: Mapping[str, Any]) -> list[str]:
    rows: list[list[object]] = []
    for row in one["benchmarks"].values():
        moved = f"{row['other_order']} of {row['comparisons']} came out otherwise"
        rows.append([f"{name_of(row)}: {moved}"])
        for name, two in row["subset"].items():
            cells = two["items"], two["comparisons"], two["other_order"]
            rows.append([name, *cells, f"{two['other_order'] / max(1, two['comparisons']):.0%}"])
    found = [table(["part", "items", "comparisons", "came out otherwise", "share"], rows)]
    found.append(caption("Comparisons: of a right with a wrong response, or of the two where a label says the better."))
    if plots_work():
        lines = [
            Line(f"{label_of(row)}, n {row['n']}", {"difference": _point(row, scale=100)})
            for row in one["benchmarks"].values()
        ]
        how = "Official figure of the second less that of the first, 95 % intervals over items."
        found.append(rows_of_points(f"Difference: {one['b']}", how, lines, "difference, percentage points", zero=0.0))
    return found


def _card(one: Mapping[str, Any], example: Mapping[str, Any]) -> str:
    facts = [f"{one['a']}: {example['a']}", f"{one['b']}: {example['b']}"]
    facts += [example["truth"]] if example.get("truth") else []
    parts = [f"<h3>{escape(example['id'] or NONE)}</h3><p class=facts>{escape(' · '.join(facts))}</p>"]
    parts += [quoted("prompt", example["prompt"])] if example["prompt"] else []
    for response in example["responses"]:
        parts.append(quoted(response["name"], response["text"]) if response["text"] else "")
        columns = "".join(_judgement(one[who], response[who]) for who in ("a", "b"))
        parts.append(f"<div class=columns>{columns}</div>")
    return f"<article>{''.join(parts)}</article>"


def _judgement(place: str, side: Mapping[str, Any]) -> str:
    score = "no score" if side["score"] is None else f"{side['score']:.2f}"
    votes = f" (mean of {side['votes']} votes; the first is shown)" if side["votes"] > 1 else ""
    text = f"<pre>{escape(side['judgement'])}</pre>" if side["judgement"] is not None else ""
    return f"<div><h4>{escape(place)}: {escape(score + votes)}</h4>{text}</div>"
