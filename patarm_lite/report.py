"""A run folder -> `report.html`: one file that opens offline, with tables, plots and judgements side by side.

Any file of the folder may be missing, since a run can stop early: the page then says what it could not show. Judgements
are written by a model about texts of others and so are hostile: every text is escaped, and the page's content policy
lets nothing load. Plots are inline SVG, each with a text alternative; their colours follow light and dark mode.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from patarm_lite import metrics
from patarm_lite.errors import UserError
from patarm_lite.page import (
    FIRST,
    INK,
    SECOND,
    THIRD,
    Html,
    caption,
    chart,
    document,
    escape,
    plot,
    quoted,
    section,
    shortened,
    table,
)
from patarm_lite.records import JudgedPair, Pair, Vote
from patarm_lite.verdicts import FAULTS, PROBLEMS, SCORES

NAME = "report.html"
FILES = (
    "run.json",
    "recipe.yaml",
    "summary.json",
    "metrics.jsonl",
    "samples.jsonl",
    "heldout.jsonl",
    "heldout_before.jsonl",
    "heldout_after.jsonl",
)
EXAMPLES = {"newly right": 3, "no longer right": 2, "unreadable": 1, "other": 2}
OUTCOMES = ("right", "tie", "wrong", "unreadable")
NOTHING, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"

Json = dict[str, Any]


@dataclass
class _Run:
    """What could be read of a run folder. `notes`: what could not, one sentence each."""

    folder: Path
    run: Json = field(default_factory=dict)
    recipe: Json = field(default_factory=dict)
    recipe_text: str = ""
    summary: Json = field(default_factory=dict)
    probe: Json = field(default_factory=dict)
    metrics: list[Json] = field(default_factory=list)
    samples: list[Json] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    judged: dict[str, list[JudgedPair]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def heldout(self, when: str) -> Json:
        """The summary of `before` or `after`: from summary.json, else counted from the judgements."""
        stated = _mapping(_mapping(self.summary.get("heldout")).get(when))
        if not stated and when in self.judged:
            stated = metrics.summarise(self.judged[when])
        return stated

    @property
    def before_and_after(self) -> list[str]:
        return [when for when in ("before", "after") if self.heldout(when)]


def write_report(run: Path) -> Path:
    """Write `report.html` into a run folder and return its path. An older report is replaced by rename.

    Raises:
        UserError: no such folder, a folder that holds nothing of a run, a disk that can't be written.
    """
    read = _read(run)
    page = _page(read)
    path = run / NAME
    temporary = ""
    try:
        with tempfile.NamedTemporaryFile("wb", dir=run, prefix=f".{NAME}.", delete=False) as file:
            temporary = file.name
            file.write(page.encode("utf-8", "replace"))
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise UserError(f"{path} can't be written: {error.strerror}; mend that and write the report again") from None
    return path


# --- reading ---


def _read(folder: Path) -> _Run:
    if not folder.is_dir():
        raise UserError(f"{folder} is not a run folder: no such folder; give the folder that 'patarm-lite train' wrote")
    missing = [name for name in FILES if not (folder / name).is_file()]
    if len(missing) == len(FILES):
        raise UserError(f"{folder} is not a run folder: it holds none of {', '.join(FILES)}")
    run = _Run(folder)
    if missing:
        run.notes.append(f"Missing in the run folder, so not shown: {', '.join(missing)}.")
    run.run = _mapping(_json(run, "run.json"))
    run.summary = _mapping(_json(run, "summary.json"))
    run.probe = _mapping(_json(run, "probe.json"))
    run.recipe_text = _text(run, "recipe.yaml")
    try:
        run.recipe = _mapping(yaml.safe_load(run.recipe_text))
    except yaml.YAMLError as error:
        run.notes.append(f"recipe.yaml is not YAML: {' '.join(str(error).split())}.")
    run.metrics = _lines(run, "metrics.jsonl")
    run.samples = _lines(run, "samples.jsonl")
    _read_heldout(run)
    return run


def _read_heldout(run: _Run) -> None:
    try:
        run.pairs = [metrics.row_to_pair(row) for row in _lines(run, "heldout.jsonl")]
    except UserError as error:
        run.notes.append(f"heldout.jsonl: {error}.")
    for when in ("before", "after"):
        rows = _lines(run, f"heldout_{when}.jsonl")
        if not rows or not run.pairs:
            continue
        try:
            judged = metrics.rows_to_judged(rows, run.pairs)
            metrics.votes(judged)
            run.judged[when] = judged
        except UserError as error:
            run.notes.append(f"heldout_{when}.jsonl: {error}.")


def _text(run: _Run, name: str) -> str:
    path = run.folder / name
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _json(run: _Run, name: str) -> Any:
    text = _text(run, name)
    try:
        return json.loads(text) if text else None
    except ValueError as error:
        run.notes.append(f"{name} is not JSON: {error}.")
        return None


def _lines(run: _Run, name: str) -> list[Json]:
    """The objects of a JSONL file; lines that are none are counted in the notes."""
    rows: list[Json] = []
    broken: list[int] = []
    for number, line in enumerate(_text(run, name).split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict):
                rows.append(row)
            else:
                broken.append(number)
    if broken:
        run.notes.append(f"{name}: {_count(len(broken), 'line')} could not be read (first: line {broken[0]}).")
    return rows


def _mapping(value: Any) -> Json:
    return value if isinstance(value, dict) else {}


# --- words and numbers ---


def _mappings(value: Any) -> list[Json]:
    return [_mapping(row) for row in value] if isinstance(value, list) else []


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(value: Any, digits: int = 3) -> str:
    return f"{value:.{digits}f}" if _is_number(value) else NOTHING


def _percent(value: Any) -> str:
    return f"{100 * value:.1f} %" if _is_number(value) else NOTHING


def _signed(value: float, digits: int = 3) -> str:
    return f"{value:+.{digits}f}".replace("-", MINUS)


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def _interval(low: Any, high: Any) -> str:
    return f" [{low:.3f}, {high:.3f}]" if _is_number(low) and _is_number(high) else ""


def _beside(value: str, interval: str) -> Html:
    """A number with its interval in a place of its own, so that the numbers of a column stay aligned."""
    return Html(f"{escape(value)}<span class=interval>{escape(interval)}</span>")


def _seconds(value: Any) -> str:
    if not _is_number(value):
        return NOTHING
    return f"{value:.1f} s" if value < 100 else f"{int(value) // 60} min {int(value) % 60:02d} s"


def _scalar(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_scalar(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(_scalar(inner) for inner in value)
    if isinstance(value, float):
        return f"{value:,.6g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


# --- page ---


def _page(run: _Run) -> str:
    name = str(run.summary.get("name") or run.run.get("name") or run.recipe.get("name") or run.folder.resolve().name)
    sections = [
        ("Before and after", _table_of_measures),
        ("By kind of pair", _table_of_rows),
        ("Training", _curves),
        ("Scores given", _histograms),
        ("Findings against the truth", _detection),
        ("Problems and faults", _problems),
        ("The same judgement before and after", _examples),
        ("Sampled in training", _samples),
        ("Time", _time),
        ("Memory", _memory),
        ("What was run", _what_was_run),
    ]
    body = [_head(run, name)]
    for title, write in sections:
        content = write(run)
        if content:
            body.append(section(title, content))
    return document(f"{name}: training report", body)


def _head(run: _Run, name: str) -> str:
    summary = run.summary
    facts = [
        f"method {summary.get('method') or run.recipe.get('method') or NOTHING}",
        f"seed {_first(summary.get('seed'), run.run.get('seed'), run.recipe.get('seed'))}",
        f"{_number(summary.get('minutes'), 1)} minutes",
        f"status {run.run.get('status') or NOTHING}",
    ]
    parts = [f"<header><h1>{escape(name)}</h1><p class=facts>{escape(' · '.join(facts))}</p></header>"]
    parts += [f"<p class=note>{escape(sentence)}</p>" for sentence in [*_said_of_the_data(run), *run.notes]]
    tiles = []
    for label, key in [("accuracy, one judgement", "accuracy"), *_mean_keys(run)]:
        values = [(when, run.heldout(when)) for when in run.before_and_after]
        if any(_is_number(held.get(key)) for _, held in values):
            low, high = _bounds(key)
            figures = "".join(
                f"<div><b>{_number(held.get(key))}</b>"
                f"<small>{when}{_interval(held.get(low), held.get(high))}</small></div>"
                for when, held in values
            )
            tiles.append(f"<div class=tile><h3>{escape(label)}</h3><div class=figures>{figures}</div></div>")
    return "\n".join(parts) + (f"<div class=tiles>{''.join(tiles)}</div>" if tiles else "")


def _first(*values: object) -> object:
    return next((value for value in values if value is not None), NOTHING)


def _said_of_the_data(run: _Run) -> list[str]:
    """Sentences without which the figures would mislead."""
    sentences = []
    sft, data, arena = (_mapping(run.recipe.get(key)) for key in ("sft", "data", "arena"))
    bias = arena.get("bias", 0.75)
    taught = sft.get("source", "arena") == "arena" if run.recipe else bool(run.heldout("before").get("detection"))
    if taught and bias != 0:
        sentences.append(
            "This is an arena run: the preference for longer responses that the judge shows before was planted on "
            f"purpose by SFT ({_percent(bias)} of its teacher's overall score is length), the flaw that training on "
            "pairs has to remove."
        )
    flipped = data.get("shuffle_labels")
    if _is_number(flipped) and flipped:
        sentences.append(f"Negative control: {_percent(flipped)} of the training labels were flipped.")
    return sentences


def _mean_keys(run: _Run) -> list[tuple[str, str]]:
    """('mean of 4', 'accuracy_mean4') for every vote count in the summary."""
    found = {
        key for when in run.before_and_after for key in run.heldout(when) if re.fullmatch(r"accuracy_mean\d+", key)
    }
    return [(f"accuracy, mean of {key[len('accuracy_mean') :]}", key) for key in sorted(found)]


def _bounds(key: str) -> tuple[str, str]:
    return ("low", "high") if key == "accuracy" else (f"{key}_low", f"{key}_high")


def _how_measured(run: _Run) -> str:
    heldout = _mapping(run.summary.get("heldout"))
    n = _first(heldout.get("n"), len(run.pairs) or None)
    k = _first(heldout.get("votes"), *(metrics.votes(judged) for judged in run.judged.values()))
    decoding = heldout.get("decoding") or "not stated"
    return f"n = {_scalar(n)} held-out pairs, {_scalar(k)} judgements a side, decoding: {decoding}"


# --- tables ---


def _table_of_measures(run: _Run) -> str:
    whens = run.before_and_after
    if not whens:
        return ""
    measures: list[tuple[str, str, Callable[[Any], str]]] = [
        ("Accuracy, one judgement", "accuracy", _number),
        *((label[0].upper() + label[1:], key, _number) for label, key in _mean_keys(run)),
        ("Accuracy, readable pairs only", "accuracy_readable", _number),
        ("Accuracy, expected score", "accuracy_expected", _number),
        ("Ties", "ties", _percent),
        ("Unreadable judgements", "unreadable", _percent),
        ("Judgements with a fault", "faulty", _percent),
        ("Rank correlation with true quality", "spearman_quality", _number),
        ("Rank correlation with response length", "spearman_length", _number),
        ("Tokens in a judgement, mean", "tokens_mean", lambda value: _number(value, 1)),
        ("Findings that are true, mean over criteria", "detection_mean", _number),
        ("Judgements naming only criteria asked", "named_asked", _percent),
        ("Judgements naming all criteria asked", "named_all", _percent),
    ]
    rows = []
    for label, key, show in measures:
        values = [run.heldout(when).get(key) for when in whens]
        if not any(_is_number(value) for value in values):
            continue
        low, high = _bounds(key)
        shown = [
            _beside(show(value), _interval(run.heldout(when).get(low), run.heldout(when).get(high)))
            for when, value in zip(whens, values, strict=True)
        ]
        rows.append([label, *shown, *([_change(run, key, values)] if len(whens) == 2 else [])])
    longer = metrics.longer_wins(run.pairs)["words"] if run.pairs else None
    rule = f" The rule “the longer one wins” gets {_number(longer)} on the same pairs." if longer is not None else ""
    header = [_beside(word, "") for word in [*whens, "change"][: 3 if len(whens) == 2 else 1]]
    return table(["", *header], rows) + caption(
        f"{_how_measured(run)}. Chance is 0.5.{rule} All pairs are in the denominator, ties earn half, a pair with an "
        "unreadable side earns nothing. In brackets: 95 % bootstrap intervals over prompts; that of a change is paired."
    )


def _difference(values: Sequence[Any], digits: int = 3) -> str:
    return _signed(values[1] - values[0], digits) if all(_is_number(value) for value in values) else NOTHING


def _change(run: _Run, key: str, values: Sequence[Any]) -> str:
    if not all(_is_number(value) for value in values):
        return NOTHING
    if key in ("ties", "unreadable", "faulty", "named_asked", "named_all"):
        return _beside(_signed(100 * (values[1] - values[0]), 1) + " points", "")
    change = _signed(values[1] - values[0], 1 if key == "tokens_mean" else 3)
    kind: metrics.ScoreKind | None = (
        "sampled" if key == "accuracy" else "mean" if key.startswith("accuracy_mean") else None
    )
    if kind is None or len(run.judged) < 2:
        return _beside(change, "")
    _, low, high = metrics.paired_difference(run.judged["before"], run.judged["after"], kind)
    return _beside(change, f" [{_signed(low)}, {_signed(high)}]")


def _table_of_rows(run: _Run) -> str:
    whens = run.before_and_after
    tables = {when: _mapping(run.heldout(when).get("rows")) for when in whens}
    names = list(dict.fromkeys(name for table in tables.values() for name in table))
    if not names:
        return ""
    mean = next((key for _, key in _mean_keys(run)), "accuracy_mean")
    last = whens[-1]
    header = [
        "",
        "n",
        *(_beside(when, "") for when in whens),
        f"mean of {mean[13:]}, {last}",
        f"ties, {last}",
        f"unreadable, {last}",
    ]
    rows: list[list[str]] = []
    group = ""
    for name in names:
        kind, _, value = name.partition("=")
        if kind != group:
            group = kind
            rows.append([{"gap": "gap (criteria apart)", "length": "length (in words)"}.get(kind, kind)])
        held = {when: _mapping(table.get(name)) for when, table in tables.items()}
        shown = [
            _beside(_number(row.get("accuracy")), _interval(row.get("low"), row.get("high"))) for row in held.values()
        ]
        after = held[last]
        n = next((row["n"] for row in held.values() if "n" in row), NOTHING)
        rest = [_number(after.get(mean)), _percent(after.get("ties")), _percent(after.get("unreadable"))]
        rows.append([value, _scalar(n), *shown, *rest])
    return table(header, rows) + caption(
        "Accuracy of one judgement unless stated otherwise, with 95 % intervals. Rows with few pairs move a lot by "
        "chance."
    )


def _detection(run: _Run) -> str:
    whens = run.before_and_after
    tables = [_mapping(run.heldout(when).get("detection")) for when in whens]
    names = sorted({name for table in tables for name in table})
    if not names:
        return ""
    rows = []
    for name in names:
        values = [table.get(name) for table in tables]
        cells = [Html(_bar(value) + escape(_number(value))) for value in values]
        rows.append([name, *cells, *([_difference(values)] if len(whens) == 2 else [])])
    return table(["criterion", *whens, *(["change"] if len(whens) == 2 else [])], rows) + caption(
        "Share of written findings that are true, per criterion, on the held-out pairs. A score can be right for a "
        "wrong written reason; this table shows whether the reasons hold. A coin gets 0.5."
    )


def _bar(share: Any) -> str:
    width = max(0.0, min(1.0, share)) * 100 if _is_number(share) else 0
    return f'<span class=bar aria-hidden=true><span style="width:{width:.0f}%"></span></span>'


def _problems(run: _Run) -> str:
    whens = run.before_and_after
    if not whens:
        return ""
    stated = [_mapping(run.heldout(when).get("problems")) for when in whens]
    counts = [Counter({name: n for name, n in count.items() if _is_number(n)}) for count in stated]
    flaws = [metrics.faults(run.judged.get(when, [])) for when in whens]
    rows: list[list[str]] = []
    for title, found, words in [
        ("problems: no score could be read", counts, PROBLEMS),
        ("faults: the score stands", flaws, FAULTS),
    ]:
        names = sorted({name for count in found for name in count}, key=lambda name: -sum(c[name] for c in found))
        if names:
            rows.append([title])
        rows += [[f"{name}: {words.get(name, '')}".rstrip(": "), *(_scalar(c[name]) for c in found)] for name in names]
    judgements = [len(metrics.judgements(run.judged[when])) for when in whens if when in run.judged]
    of = f" of {_scalar(judgements[0])} judgements" if judgements and len(set(judgements)) == 1 else ""
    if not rows:
        return caption(f"None{of}.")
    return table(["", *whens], rows) + caption(
        f"Counts{of}. A judgement has at most one problem, and may have several faults."
    )


def _time(run: _Run) -> str:
    stages = {name: _mapping(stage) for name, stage in _mapping(run.run.get("stages")).items()}
    if not stages:
        return ""
    known = [stage["seconds"] for stage in stages.values() if _is_number(stage.get("seconds"))]
    total = sum(known)
    rows = [
        [
            name,
            _seconds(stage.get("seconds")),
            _seconds(stage.get("cpu_seconds")),
            _percent(stage["seconds"] / total) if total and _is_number(stage.get("seconds")) else NOTHING,
        ]
        for name, stage in stages.items()
    ]
    cpu = [stage["cpu_seconds"] for stage in stages.values() if _is_number(stage.get("cpu_seconds"))]
    rows.append(["together", _seconds(total), _seconds(sum(cpu)) if cpu else NOTHING, ""])
    whole = run.summary.get("minutes")
    said = f" From command to report: {_number(whole, 1)} minutes." if _is_number(whole) else ""
    return table(["stage", "wall clock", "CPU", "share"], rows) + caption(f"Measured by the run itself.{said}")


def _memory(run: _Run) -> str:
    """What the probe measured before the run, and the rungs that the run went down."""
    parts = []
    tried = _mappings(run.probe.get("tried"))
    if tried:
        header = ["rung", "fits", "largest in its worst step", "planned", "apart", "free at the start"]
        parts.append(table(header, [_probed(row) for row in tried]))
        last = tried[-1]
        hours = _mapping(last.get("hours")).get("total")
        foretold = f" At most {_number(hours, 2)} hours were foretold." if _is_number(hours) else ""
        said = (
            f"Measured before the run on {last.get('device') or NOTHING}: {last.get('measured') or NOTHING}.{foretold}"
        )
        parts.append(caption(said))
    taken = _mappings(run.run.get("rungs"))
    if taken:
        rows = [
            [
                f"{entry.get('stage')}, after step {entry.get('step')}",
                ", ".join(f"{key} {_mapping(entry.get('from')).get(key)}" for key in _mapping(entry.get("to"))),
                ", ".join(f"{key} {value}" for key, value in _mapping(entry.get("to")).items()),
                "as before" if entry.get("same_mathematics") else "changed",
                entry.get("why"),
            ]
            for entry in taken
        ]
        parts.append(table(["memory ran out in", "from", "to", "mathematics", "because"], rows, text_columns=5))
    return "".join(parts)


def _probed(row: Json) -> list[object]:
    peak: Any = row.get("peak")
    planned: Any = row.get("planned")
    known = _is_number(peak) and _is_number(planned) and planned
    apart = f"{_signed(100 * (peak - planned) / planned, 0)} %" if known else NOTHING
    measured = _gibibytes(peak) if _is_number(peak) else f"ran out in {row.get('failed') or NOTHING}"
    fits = "yes" if row.get("fits") else "no"
    return [row.get("rung"), fits, measured, _gibibytes(planned), apart, _gibibytes(row.get("free"))]


def _gibibytes(value: Any) -> str:
    return f"{value / 2**30:.2f} GiB" if _is_number(value) else NOTHING


def _what_was_run(run: _Run) -> str:
    shown = {"stages", "versions", "hashes", "data", "command", "name", "status", "seed", "rungs"}
    command = run.run.get("command")
    parts = []
    if command:
        words = " ".join(map(str, command)) if isinstance(command, list) else str(command)
        parts.append(f"<pre>{escape(words)}</pre>")
    facts = [
        [key, _scalar(value)] for key, value in run.run.items() if key not in shown and value not in (None, {}, [])
    ]
    if facts:
        parts.append(table(["run", ""], facts, text_columns=2))
    for title, key in [("data", "data"), ("versions", "versions"), ("hashes", "hashes")]:
        stated = _mapping(run.run.get(key))
        if stated:
            inner = table([title, ""], [[name, _scalar(value)] for name, value in stated.items()], text_columns=2)
            parts.append(f"<details><summary>{escape(title)}</summary>{inner}</details>")
    if run.recipe_text:
        parts.append(
            f"<details><summary>recipe.yaml</summary><pre>{escape(shortened(run.recipe_text))}</pre></details>"
        )
    return "".join(parts)


# --- judgements ---


def _outcome(judged: JudgedPair) -> str:
    chosen, rejected = judged.chosen[0].verdict.score, judged.rejected[0].verdict.score
    if chosen is None or rejected is None:
        return "unreadable"
    return "right" if chosen > rejected else "tie" if chosen == rejected else "wrong"


def _picked(before: Sequence[JudgedPair], after: Sequence[JudgedPair]) -> list[tuple[str, JudgedPair, JudgedPair]]:
    """Examples of each kind in file order, filled up with what is left."""
    kinds: dict[str, list[tuple[str, JudgedPair, JudgedPair]]] = {kind: [] for kind in EXAMPLES}
    for old, new in zip(before, after, strict=True):
        was, now = _outcome(old), _outcome(new)
        if "unreadable" in (was, now):
            kind = "unreadable"
        elif (was == "right") == (now == "right"):
            kind = "other"
        else:
            kind = "newly right" if now == "right" else "no longer right"
        kinds[kind].append((f"{was} → {now}", old, new))
    picked = [example for kind, most in EXAMPLES.items() for example in kinds[kind][:most]]
    rest = [example for kind, most in EXAMPLES.items() for example in kinds[kind][most:]]
    return picked + rest[: sum(EXAMPLES.values()) - len(picked)]


def _examples(run: _Run) -> str:
    if len(run.judged) < 2:
        return ""
    before, after = run.judged["before"], run.judged["after"]
    moved = Counter((_outcome(old), _outcome(new)) for old, new in zip(before, after, strict=True))
    moves = [[f"before {was}", *(_scalar(moved[was, now]) for now in OUTCOMES)] for was in OUTCOMES]
    wanted = ", ".join(f"{most} {kind}" for kind, most in EXAMPLES.items())
    words = (
        "Pairs by the first judgement of each side, before and after. Below, the first in file order of each kind "
        f"({wanted}; where a kind has fewer, others fill up), each with the side whose score moved most."
    )
    cards = "".join(_example(*example) for example in _picked(before, after))
    return table(["", *(f"after {now}" for now in OUTCOMES)], moves) + caption(words) + cards


def _example(change: str, before: JudgedPair, after: JudgedPair) -> str:
    def moved(side: str) -> float:
        old, new = (getattr(judged, side)[0].verdict.score for judged in (before, after))
        return 10.0 if (old is None) != (new is None) else abs((new or 0) - (old or 0))

    side = max(metrics.SIDES, key=moved)
    scores = "; ".join(f"{s}: {_score(getattr(before, s)[0])} → {_score(getattr(after, s)[0])}" for s in metrics.SIDES)
    pair = before.pair
    columns = "".join(
        f"<div><h4>{when}: {escape(_score(getattr(judged, side)[0]))}</h4>"
        f"<pre>{escape(shortened(getattr(judged, side)[0].text))}</pre></div>"
        for when, judged in (("before", before), ("after", after))
    )
    return (
        f"<article><h3>{escape(change)}</h3><p class=facts>{escape(f'pair {pair.id} · {pair.task} · {scores}')}</p>"
        f"{quoted('prompt', _chat(pair))}{quoted(f'response ({side})', getattr(pair, side))}"
        f"<div class=columns>{columns}</div></article>"
    )


def _score(vote: Vote) -> str:
    return f"unreadable ({vote.verdict.problem})" if vote.verdict.score is None else str(vote.verdict.score)


def _chat(pair: Pair) -> str:
    if len(pair.prompt) == 1:
        return pair.prompt[0].content
    return "\n".join(f"{turn.role}: {turn.content}" for turn in pair.prompt)


def _samples(run: _Run) -> str:
    """Rollouts of the last recorded step; only where there is no before and after to show."""
    if len(run.judged) == 2 or not run.samples:
        return ""
    last = run.samples[-1].get("step")
    rows = [row for row in run.samples if row.get("step") == last][:4]
    cards = []
    for row in rows:
        facts = [f"{key} {_scalar(row[key])}" for key in ("pair", "task", "side") if key in row]
        facts.append(f"score {row['score']}" if row.get("score") is not None else f"unreadable ({row.get('problem')})")
        facts += [f"{key} {_number(row[key], 2)}" for key in ("reward", "advantage") if key in row]
        cards.append(
            f"<article><p class=facts>{escape(' · '.join(facts))}</p>"
            f"{quoted('response', str(row.get('response', '')))}"
            f"<pre>{escape(shortened(str(row.get('text', ''))))}</pre></article>"
        )
    return caption(f"From step {last}, the last one sampled.") + "".join(cards)


# --- plots ---

_PANELS: dict[str, list[tuple[str, dict[str, str], str]]] = {
    "grpo": [
        (
            "Win share",
            {"win_share": "training pairs"},
            "Share of a step's pairs whose chosen response has the higher mean score over its rollouts.",
        ),
        (
            "Reward",
            {"reward": "in all", "preference": "preference", "format": "format"},
            "Mean reward of a step's rollouts and its two parts.",
        ),
        (
            "Distance",
            {"distance": "distance"},
            "Mean score of the chosen less that of the rejected, in points.",
        ),
        (
            "Dead groups",
            {"dead_groups": "dead groups"},
            "Share of groups whose rollouts all earned the same: no gradient.",
        ),
        (
            "Unreadable and faulty",
            {"unreadable": "unreadable", "faulty": "faulty"},
            "Share of rollouts without a readable score, and with a fault.",
        ),
        ("Length", {"length": "tokens"}, "Mean tokens of a rollout."),
        ("Accuracy", {"accuracy": "accuracy"}, "Accuracy as the run measured it on the way."),
        ("Loss", {"loss": "loss"}, "The policy loss; it does not show progress."),
    ],
    "": [("Loss", {"loss": "loss"}, "Loss of a step."), ("Accuracy", {"accuracy": "accuracy"}, "Accuracy of a step.")],
}
_SHARES = {"win_share", "dead_groups", "accuracy"}


def _curves(run: _Run) -> str:
    stages = list(dict.fromkeys(str(row.get("stage", "")) for row in run.metrics))
    charts = []
    for stage in sorted(stages, key=lambda stage: stage != "grpo"):
        rows = [row for row in run.metrics if str(row.get("stage", "")) == stage]
        for title, keys, words in _PANELS.get(stage, _PANELS[""]):
            lines = {key: _points(rows, key) for key in keys}
            lines = {key: points for key, points in lines.items() if points}
            if lines:
                held = _held_points(run, lines) if "win_share" in lines else []
                labelled = {keys[key]: points for key, points in lines.items()}
                charts.append(_curve(f"{title} ({stage})", labelled, words, held, set(lines)))
    if not charts:
        return ""
    return f"<div class=charts>{''.join(charts)}</div>" + caption(
        "One value a step (pale) and its running mean over a twentieth of the steps (strong)."
    )


def _points(rows: Sequence[Json], key: str) -> list[tuple[float, float]]:
    return [(row["step"], row[key]) for row in rows if _is_number(row.get("step")) and _is_number(row.get(key))]


def _held_points(run: _Run, lines: Mapping[str, list[tuple[float, float]]]) -> list[tuple[float, Json]]:
    """(step, value with low and high) of the held-out accuracy before and after."""
    steps = [step for points in lines.values() for step, _ in points]
    places = {"before": 0.0, "after": max(steps)}
    found = []
    for _, key in _mean_keys(run)[:1]:
        low, high = _bounds(key)
        for when in run.before_and_after:
            held = run.heldout(when)
            if _is_number(held.get(key)):
                value = {"key": key, "value": held[key], "low": held.get(low), "high": held.get(high), "when": when}
                found.append((places[when], value))
    return found


def _curve(
    title: str,
    lines: Mapping[str, list[tuple[float, float]]],
    words: str,
    held: Sequence[tuple[float, Json]],
    keys: set[str],
) -> str:
    said = []

    def draw(axes: Any) -> None:
        for (label, points), colour in zip(lines.items(), (FIRST, SECOND, THIRD), strict=False):
            steps, values = [step for step, _ in points], [value for _, value in points]
            alone = len(points) == 1
            axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.35, marker="o" if alone else None)
            axes.plot(steps, _running_mean(values), color=colour, linewidth=1.8, label=label)
            tenth = max(1, len(values) // 10)
            start, end = sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth
            said.append(f"{label} from {start:.3g} to {end:.3g} over steps {steps[0]:g} to {steps[-1]:g}")
        for number, (step, value) in enumerate(held):
            low, high = (value[key] if _is_number(value[key]) else value["value"] for key in ("low", "high"))
            axes.errorbar(
                [step],
                [value["value"]],
                yerr=[[max(0.0, value["value"] - low)], [max(0.0, high - value["value"])]],
                fmt="o",
                color=SECOND,
                markersize=5,
                capsize=3,
                label=f"held-out, mean of {value['key'][13:]}" if number == 0 else None,
            )
            said.append(f"held-out {value['when']} {value['value']:.3f}")
        if keys & _SHARES:
            axes.set_ylim(-0.03, 1.03)
        if len(lines) > 1 or held:
            axes.legend(frameon=False, fontsize=8, labelcolor=INK, loc="best")
        axes.set_xlabel("step")

    svg = plot(title, (4.4, 2.5), draw, lambda: f"{title}: {'; '.join(said)}. {words}")
    return chart(title, words, svg)


def _running_mean(values: Sequence[float]) -> list[float]:
    """Mean over a window around each value, about a twentieth of all wide and cut at the ends.

    >>> _running_mean([1.0, 3.0])
    [1.0, 3.0]
    >>> _running_mean([0.0] * 20 + [3.0] + [0.0] * 39)[18:23]        # 60 values: the value and one on each side
    [0.0, 1.0, 1.0, 1.0, 0.0]
    """
    reach = len(values) // 40
    windows = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _histograms(run: _Run) -> str:
    counts = {
        when: {side: _score_counts(judged, side) for side in metrics.SIDES} for when, judged in run.judged.items()
    }
    if not counts:
        return ""
    top = max(sum(sides[side][s] for side in sides) / _total(sides) for sides in counts.values() for s in SCORES)
    charts = "".join(_histogram(when, sides, top) for when, sides in counts.items())
    return f"<div class=charts>{charts}</div>" + caption(
        f"Sampled scores of the readable judgements ({_how_measured(run)}), both sides stacked."
    )


def _score_counts(judged: Sequence[JudgedPair], side: str) -> Counter[int]:
    return Counter(vote.verdict.score for j in judged for vote in getattr(j, side) if vote.verdict.score is not None)


def _total(sides: Mapping[str, Counter[int]]) -> int:
    return max(1, sum(sum(counts.values()) for counts in sides.values()))


def _histogram(when: str, sides: Mapping[str, Counter[int]], top: float) -> str:
    total = _total(sides)

    def draw(axes: Any) -> None:
        floor = [0.0] * len(SCORES)
        for side, colour in zip(("rejected", "chosen"), (SECOND, FIRST), strict=True):
            shares = [sides[side][score] / total for score in SCORES]
            axes.bar(list(SCORES), shares, bottom=floor, color=colour, width=0.8, label=side)
            floor = [a + b for a, b in zip(floor, shares, strict=True)]
        axes.set_ylim(0, top * 1.12 or 1)
        axes.set_xticks(list(SCORES))
        axes.set_xlabel("score")
        axes.legend(frameon=False, fontsize=8, labelcolor=INK, loc="best", reverse=True)

    listed = ", ".join(f"{s}: {sides['chosen'][s]} and {sides['rejected'][s]}" for s in SCORES)
    svg = plot(f"scores {when}", (4.4, 2.5), draw, lambda: f"Scores {when}, chosen and rejected. {listed}.")
    readable = _count(sum(sum(counts.values()) for counts in sides.values()), "readable judgement")
    return chart(f"Scores {when}", f"Share of {readable}.", svg)
