"""One HTML page that opens offline: escaped texts, tables, plots as inline SVG, light and dark.

Texts on a page are written by models about texts of others and so are hostile: every one is escaped, and the page's
content policy lets nothing load. Plots have a text alternative each, and their colours follow light and dark mode. Blue
and orange are told apart by most colour-blind readers; where colour alone would tell two things apart, their shapes
differ too.
"""

from __future__ import annotations

import html
import importlib.util
import io
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from patarm_lite.errors import missing_extra

LONGEST = 4000
"""Characters of one text shown."""
NO_PLOTS = "Plots need matplotlib, which is not installed here; the tables say the same."
INK, MUTED, GRID, FIRST, SECOND, THIRD, BAD = (f"#0{number}0{number}0{number}" for number in range(1, 8))
"""Colours drawn; each becomes a variable of the style sheet."""
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", FIRST: "first", SECOND: "second", THIRD: "third", BAD: "bad"}
_FONT = "DejaVu Sans"


class Html(str):
    """Markup of ours, which is not escaped again."""


def document(title: str, body: Sequence[str]) -> str:
    """A whole page. `body`: its parts, markup already."""
    return _PAGE.format(title=escape(title), style=_STYLE, body="\n".join(body))


def section(title: str, content: str) -> str:
    """A part of a page under its heading; nothing where there is no content."""
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


def escape(value: object) -> str:
    """A value as text that can't become markup."""
    return value if isinstance(value, Html) else html.escape(str(value), quote=True)


def shortened(text: str, longest: int = LONGEST) -> str:
    """A text of at most so many characters, and how many there are where some are missing."""
    return text if len(text) <= longest else f"{text[:longest]} … ({len(text):,} characters in all)"


def table(header: Sequence[object], rows: Iterable[Sequence[object]], text_columns: int = 1) -> str:
    """A table with right-aligned numbers after the first columns; a row of one cell is a heading of its own."""

    def cell(tag: str, index: int, value: object) -> str:
        return f"<{tag}{' class=num' if index >= text_columns else ''}>{escape(value)}</{tag}>"

    lines = [f"<tr>{''.join(cell('th', i, value) for i, value in enumerate(header))}</tr>"]
    for row in rows:
        if len(row) == 1:
            lines.append(f"<tr class=group><th colspan={len(header)}>{escape(row[0])}</th></tr>")
        else:
            lines.append(f"<tr>{''.join(cell('td', i, value) for i, value in enumerate(row))}</tr>")
    return f"<div class=wide><table><thead>{lines[0]}</thead><tbody>{''.join(lines[1:])}</tbody></table></div>"


def stacked(value: str, beneath: str) -> Html:
    """A number with its interval under it, so that a column stays narrow."""
    return Html(f"{escape(value)}<br><small>{escape(beneath)}</small>")


def caption(text: str) -> str:
    """Words below a table or a plot."""
    return f"<p class=caption>{escape(text)}</p>"


def note(text: str) -> str:
    """A sentence that nobody should overlook."""
    return f"<p class=note>{escape(text)}</p>"


def quoted(label: str, text: str, longest: int = LONGEST) -> str:
    """A text of others under its name."""
    return (
        f"<div class=quoted><h4>{escape(label)}</h4><blockquote>{escape(shortened(text, longest))}</blockquote></div>"
    )


def chart(title: str, words: str, picture: str, rows: bool = False) -> str:
    """A plot under its title and a sentence that says how to read it. `rows`: it stands by itself, wider."""
    kind = " class=rows" if rows else ""
    return f"<figure{kind}><figcaption><b>{escape(title)}</b> {escape(words)}</figcaption>{picture}</figure>"


def plots_work() -> bool:
    """Whether plots can be drawn here."""
    return importlib.util.find_spec("matplotlib") is not None


def plot(
    name: str,
    inches: tuple[float, float],
    draw: Callable[[Any], None],
    alternative: Callable[[], str],
    fitted: bool = False,
) -> str:
    """One plot as inline SVG that loads nothing: no prolog, no namespaces, ids of its own, colours as variables.

    Args:
        name: tells its ids apart from those of the page's other plots.
        draw: draws on the axes. alternative: the plot in words, asked for after it was drawn.
        fitted: whether the axes make room for labels of any length; else their place is fixed, so that plots beside
            each other are aligned.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise missing_extra("train", "matplotlib") from None
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": slug,
        "text.parse_math": False,
        "font.family": [_FONT],
        "font.size": 9,
        "axes.edgecolor": GRID,
        "axes.labelcolor": MUTED,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "text.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=inches, layout="constrained" if fitted else None)
        if not fitted:
            figure.subplots_adjust(left=0.13, right=0.98, top=0.95, bottom=0.19)
        figure.patch.set_visible(False)
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        axes.grid(axis="y", color=GRID, linewidth=0.6)
        axes.tick_params(length=0)
        draw(axes)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = file.getvalue()
    svg = text[text.index("<svg") :].strip()
    svg = re.sub(r' (?:xmlns(?::\w+)?|version|width|height)="[^"]*"', "", svg[: svg.index(">")]) + svg[svg.index(">") :]
    svg = re.sub(r'((?: id="|href="#|url\(#))', rf"\g<1>{slug}-", svg).replace("xlink:href", "href")
    svg = svg.replace(f"'{_FONT}'", "system-ui, sans-serif")
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(alternative())}"', 1)


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --card: #f6f7f9; --ink: #1b1f24; --muted: #5b6470; --grid: #d9dde3;
  --first: #2563eb; --second: #b45309; --third: #0f7a5e; --bad: #b42318; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --card: #1d2127; --ink: #e7eaee; --muted: #9aa4b1;
  --grid: #353c46; --first: #7aa7ff; --second: #f0a848; --third: #4cc9a0;
  --bad: #ff8a7a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { margin: 0; font-size: 2rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 3rem 0 .75rem; font-size: 1.3rem; }
h3 { margin: 0 0 .25rem; font-size: 1rem; }
h4 { margin: 0 0 .25rem; font-size: .8rem; font-weight: 600; color: var(--muted); }
.facts, .caption { color: var(--muted); font-size: .9rem; overflow-wrap: anywhere; }
.facts { margin: .25rem 0 .75rem; }
.caption { margin: .6rem 0 0; max-width: 52rem; }
.note { margin: .75rem 0 0; padding: .6rem .9rem; border-left: 3px solid var(--second); background: var(--card);
  font-size: .95rem; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1rem; margin-top: 1.5rem; }
.tile, article { background: var(--card); border-radius: 8px; padding: 1rem 1.1rem; }
.tile h3 { color: var(--muted); font-weight: 600; font-size: .9rem; }
.figures { display: flex; gap: 2rem; flex-wrap: wrap; }
.figures b { display: block; font-size: 2rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.figures div:first-child:not(:last-child) b { color: var(--muted); font-weight: 500; }
.figures small { color: var(--muted); font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
.rows { max-width: 40rem; margin: 1.25rem 0; }
td small { color: var(--muted); font-size: .8rem; }
.problem, .warning, .fine, .unknown { font-size: .85rem; white-space: nowrap; }
.problem { color: var(--bad); font-weight: 700; } .warning { color: var(--second); font-weight: 600; }
.fine { color: var(--third); } .unknown { color: var(--muted); }
table { border-collapse: collapse; width: 100%; font-size: .92rem; margin-top: .25rem; }
th, td { padding: .34rem .6rem; text-align: left; border-bottom: 1px solid var(--grid); vertical-align: top; }
th:first-child, td:first-child { padding-left: 0; }
thead th { color: var(--muted); font-weight: 600; font-size: .85rem; vertical-align: bottom; }
.num { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
thead .num { white-space: normal; }
.interval { display: inline-block; min-width: 7.6rem; padding-left: .45rem; color: var(--muted); text-align: left; }
td:last-child .interval, th:last-child .interval { min-width: 8.7rem; }
.group th { padding-top: 1rem; color: var(--muted); font-size: .85rem; }
td { overflow-wrap: break-word; }
td:first-child { min-width: 8rem; }
.bar { display: inline-block; width: 7rem; height: .5rem; margin-right: .6rem; background: var(--grid);
  border-radius: 4px; overflow: hidden; vertical-align: middle; }
.bar span { display: block; height: 100%; background: var(--first); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1.75rem 1.5rem; }
figure { margin: 0; display: flex; flex-direction: column; justify-content: space-between; }
figcaption { font-size: .85rem; color: var(--muted); margin-bottom: .4rem; }
figcaption b { display: block; color: var(--ink); font-size: .95rem; }
svg { display: block; width: 100%; height: auto; }
article { margin-top: 1rem; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1rem; margin-top: .75rem; }
.quoted { margin-top: .6rem; }
blockquote { margin: 0; padding-left: .75rem; border-left: 2px solid var(--grid); white-space: pre-wrap;
  overflow-wrap: anywhere; max-height: 14rem; overflow-y: auto; }
pre { margin: 0; padding: .75rem; background: var(--paper); border: 1px solid var(--grid); border-radius: 6px;
  font: .82rem/1.45 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 24rem;
  overflow-y: auto; unicode-bidi: isolate; }
details { margin-top: .75rem; } details table { width: auto; } summary { cursor: pointer; color: var(--muted); }
details pre { max-height: none; margin-top: .5rem; }
@media print { :root { --paper: #fff; --card: #fff; --ink: #000; --muted: #444; } }
"""
