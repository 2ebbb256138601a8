"""What `bench-model` found, as Markdown, as text and as a page with plots that opens offline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from patarm_lite.evals.items import name_of
from patarm_lite.evals.scoreboard import percent
from patarm_lite.page import (
    FIRST,
    MUTED,
    SECOND,
    caption,
    chart,
    document,
    escape,
    note,
    plot,
    plots_work,
    section,
    table,
)

LOOKS = (("o", FIRST, 0.14), ("s", SECOND, -0.14))
"""Marker, colour and place of a column in the plots."""
PARTLY = "A benchmark in part is not comparable with published figures of the whole."

Json = Mapping[str, Any]


def facts(found: Json) -> list[str]:
    """What a reader must know to read the figures, in sentences."""
    lines = []
    for what in ("model", "evaluator"):
        side = found[what]
        if side is not None:
            about = f"; {side['about']}" if side["about"] else ""
            lines.append(
                f"{what} {side['place']}: fingerprint {side['fingerprint'][:12]}, {side['backend']}, tokens "
                f"{side['tokens']}, {side['settings']}{about}."
            )
    for known in found["benchmarks"].values():
        lines += [f"{known['title']}: {words}" for words in notes(known)]
    lines.append("Figures are percentages; intervals (95 %) resample prompts.")
    if any(known["part"] for known in found["benchmarks"].values()):
        lines.append(PARTLY)
    return lines


def notes(known: Json) -> list[str]:
    """What must be said of one benchmark's figures."""
    lines = list(known["notes"])
    if known.get("empty"):
        lines.append(f"{known['empty']} responses are empty.")
    if "unreadable" in known:
        asked = f"{percent(known['unreadable'])} % of {known['answers']} answers could not be read"
        unasked = known["unasked"]
        more = "" if unasked is None else f", {percent(unasked)} % of {known['questions']} questions were not asked"
        lines.append(f"{asked}{more}.")
    return lines


def headline(known: Json) -> Json | None:
    """The figure that stands for the whole."""
    row = known["rows"][known["headline"]["row"]]
    found: Json | None = row.get(known["headline"]["column"])
    return found


def _figure(one: Json | None) -> list[str]:
    return [percent(None), percent(None)] if one is None else [percent(one["value"]), _range(one)]


def _range(one: Json) -> str:
    return f"{percent(one['low'])} to {percent(one['high'])}"


def grid(known: Json) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a benchmark's table."""
    header = ["", "n", *(cell for column in known["columns"] for cell in (column, "95 %"))]
    rows = [
        [name, str(row["n"]), *(cell for column in known["columns"] for cell in _figure(row[column]))]
        for name, row in known["rows"].items()
    ]
    return header, rows


def markdown(found: Json) -> str:
    """Everything as Markdown."""
    lines = ["# Assistant model", ""]
    lines += [f"- {line}" for line in facts(found)]
    for known in found["benchmarks"].values():
        header, rows = grid(known)
        lines += ["", f"## {name_of(known)}", "", f"Official rule: {known['rule']}. Items from {known['source']}.", ""]
        lines += [f"| {' | '.join(cells)} |" for cells in (header, ["---", *["---:"] * (len(header) - 1)], *rows)]
    return "\n".join(lines) + "\n"


def score_text(found: Json) -> str:
    """The figures of stored responses or decisions as text: one line a row."""
    header, rows = grid(found)
    width = max(len(row[0]) for row in rows)
    lines = [f"{name_of(found)}, {found['items']} items; official rule: {found['rule']}"]
    for cells in (header, *rows):
        figures = [f"  {cell:>{14 if place % 2 else 13}}" for place, cell in enumerate(cells[2:])]
        lines.append(f"{cells[0]:{width}}  {cells[1]:>5}{''.join(figures)}".rstrip())
    return "\n".join([*lines, *notes(found), *([PARTLY] if found["part"] else [])])


def page(found: Json) -> str:
    """Everything as one HTML page; nothing in it is loaded from anywhere."""
    model = found["model"]
    told = f"{model['place']} · fingerprint {model['fingerprint'][:12]} · {model['settings']}"
    body = [f"<header><h1>Assistant model</h1><p class=facts>{escape(told)}</p></header>"]
    body += [note(line) for known in found["benchmarks"].values() for line in known["notes"]]
    for name, known in found["benchmarks"].items():
        header, rows = grid(known)
        words = f"Official rule: {known['rule']}. Items from {known['source']}."
        parts = [_chart(name, known) if plots_work() else "", table(header, rows), caption(words)]
        body.append(section(name_of(known), "".join(parts)))
    body.append(section("How to read this", "".join(caption(line) for line in facts(found))))
    return document("Assistant model", body)


def _chart(name: str, known: Json) -> str:
    """Every row of a benchmark's table with its intervals."""
    rows: list[tuple[str, Json]] = list(known["rows"].items())[::-1]
    columns: Sequence[str] = known["columns"]

    def draw(axes: Any) -> None:
        for (marker, colour, shift), column in zip(LOOKS, columns, strict=False):
            spots = [(place + shift, row[column]) for place, (_, row) in enumerate(rows) if row[column] is not None]
            for place, one in spots:
                axes.plot([100 * one["low"], 100 * one["high"]], [place, place], color=colour, linewidth=1.2)
            x, y = [100 * one["value"] for _, one in spots], [place for place, _ in spots]
            axes.plot(x, y, marker, color=colour, markersize=4, label=column)
        axes.set_yticks(range(len(rows)), [label for label, _ in rows])
        axes.set_xlim(-2, 102)
        axes.set_xlabel("percent")
        axes.grid(axis="x", color=MUTED, linewidth=0.3)
        axes.set_ylim(-0.7, len(rows) - 0.3)
        axes.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(columns))

    def alternative() -> str:
        said = [
            f"{label}: " + ", ".join(f"{column} {' ('.join(_figure(row[column]))})" for column in columns)
            for label, row in reversed(rows)
        ]
        return f"{name_of(known)}. {'; '.join(said)}"

    picture = plot(f"{name} figures", (7.6, 1.2 + 0.26 * len(rows)), draw, alternative, fitted=True)
    return chart(name_of(known), "Points with 95 % intervals.", picture)
