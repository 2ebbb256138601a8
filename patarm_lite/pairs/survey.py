"""What `patarm-lite pairs` shows: the layout found, counts, lengths, flaws, and three judging prompts."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from patarm_lite.pairs.checks import contradictions, length_bias, spread
from patarm_lite.pairs.contamination import RUN, Overlap, contamination
from patarm_lite.pairs.load import Dropped, LoadedPairs
from patarm_lite.prompts import END_TOKEN, Protocol, inert, segments
from patarm_lite.records import TASKS, Pair
from patarm_lite.rubrics import primary_rubric

EXAMPLES = 3
CONTROL_TOKENS = ("<|im_start|>", END_TOKEN, "<|endoftext|>")
"""Control tokens broken in the prompts shown; a judge's own tokenizer may have more."""
_SHOWN_ROWS = 12
_SHOWN_CHARACTERS = 700
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def survey(
    loaded: LoadedPairs,
    *,
    against: Sequence[str] = (),
    also_dropped: Sequence[Dropped] = (),
    protocol: Protocol | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Everything worth knowing about some pairs before a run, as plain values for JSON.

    Args:
        against: benchmark files whose prompts should not be among the pairs.
        also_dropped: what later filters would drop (`drop_long`), listed with the rest.
        protocol: of the judging prompts shown; the default one where None.
        seed: of the choice of prompts shown (one of each task first).
    """
    pairs = loaded.pairs
    dropped = [*loaded.dropped, *also_dropped]
    made = Counter(pair.meta.get("file", pair.source) for pair in pairs)
    left_out = Counter(one.source for one in dropped)
    kinds = Counter(kind_of(one.reason) for one in dropped)
    return {
        "schema": 1,
        "files": [
            {"source": s, "layout": layout, "rows": loaded.rows[s], "pairs": made[s], "dropped": left_out[s]}
            for s, layout in loaded.layouts.items()
        ],
        "pairs": len(pairs),
        "prompts": len({pair.prompt for pair in pairs}),
        "tasks": {task: count for task in TASKS if (count := sum(pair.task == task for pair in pairs))},
        "task_from": dict(Counter(str(pair.meta.get("task_from", "the pair itself")) for pair in pairs).most_common()),
        "sources": dict(Counter(pair.source for pair in pairs).most_common()),
        "lengths": {
            "unit": "characters",
            "prompt": spread([sum(len(turn.content) for turn in pair.prompt) for pair in pairs]),
            "chosen": spread([len(pair.chosen) for pair in pairs]),
            "rejected": spread([len(pair.rejected) for pair in pairs]),
        },
        "length_bias": length_bias(pairs)
        | {"by_task": {t: length_bias(some) for t in TASKS if (some := [pair for pair in pairs if pair.task == t])}},
        "duplicates": kinds["duplicate"],
        "identical_sides": kinds["chosen and rejected are identical"],
        "empty_replies": sum(kinds[f"the {side} reply is empty"] for side in ("chosen", "rejected")),
        "not_text": sum(kinds[f"the {side} reply is not text"] for side in ("chosen", "rejected")),
        "ties": kinds["tie"],
        "contradictions": [[first.id, second.id] for first, second in contradictions(pairs)],
        "dropped": {"total": len(dropped), "by_reason": _by_reason(dropped)},
        "contamination": [_overlap(one) for one in contamination(pairs, against).files],
        "examples": [_example(pair, side, protocol or Protocol()) for pair, side in _shown(pairs, seed)],
    }


def _overlap(found: Overlap) -> dict[str, Any]:
    return asdict(found) | {name: [asdict(match) for match in getattr(found, name)] for name in ("exact", "runs")}


def kind_of(reason: str) -> str:
    """A reason without its details: what stands before the first colon."""
    return reason.split(":", 1)[0]


def _by_reason(dropped: Sequence[Dropped]) -> list[dict[str, Any]]:
    """Kinds of reasons with counts, and under each source every row number with its details."""
    kinds: dict[str, dict[str, list[Dropped]]] = {}
    for one in dropped:
        kinds.setdefault(kind_of(one.reason), {}).setdefault(one.source, []).append(one)
    listed = [
        {
            "reason": kind,
            "count": sum(map(len, sources.values())),
            "rows": {
                source: [{"row": one.row, "detail": one.reason.partition(":")[2].strip()} for one in some]
                for source, some in sources.items()
            },
        }
        for kind, sources in kinds.items()
    ]
    return sorted(listed, key=lambda entry: -int(str(entry["count"])))


def _shown(pairs: Sequence[Pair], seed: int) -> list[tuple[Pair, str]]:
    rng = random.Random(seed)
    order = rng.sample(range(len(pairs)), len(pairs))
    first_of_task: dict[str, int] = {}
    for place in order:
        first_of_task.setdefault(pairs[place].task, place)
    places = list(dict.fromkeys([*first_of_task.values(), *order]))[:EXAMPLES]
    return [(pairs[place], ("chosen", "rejected")[n % 2]) for n, place in enumerate(places)]


def _example(pair: Pair, side: str, protocol: Protocol) -> dict[str, Any]:
    response = pair.chosen if side == "chosen" else pair.rejected
    parts = segments(
        protocol, pair.prompt, response, task=pair.task, rubric=primary_rubric(pair.task), reference=pair.reference
    )
    pieces = [{"text": inert(p.text, CONTROL_TOKENS) if p.content else p.text, "content": p.content} for p in parts]
    return {"id": pair.id, "task": pair.task, "side": side, "segments": pieces}


def render_survey(data: dict[str, Any]) -> str:
    """The survey as text for a terminal. Long texts and long lists are cut, and say so; `--json` has all of them."""
    lines: list[str] = []
    for file in data["files"]:
        lines += [
            f"{file['source']}: {file['rows']} rows -> {_count(file['pairs'], 'pair')}, {file['dropped']} dropped",
            f"  layout  {file['layout']}",
        ]
    n = data["pairs"]
    lines += ["", f"{_count(n, 'pair')} of {_count(data['prompts'], 'prompt')}"]
    lines.append("  tasks    " + (_listed(data["tasks"]) or "none"))
    lines.append("  task by  " + (_listed(data["task_from"]) or "none"))
    lines.append("  sources  " + (_listed(data["sources"]) or "none"))
    if n:
        lines += ["", f"lengths in characters{'':<9}min   median     mean      p90      max"]
        for name in ("prompt", "chosen", "rejected"):
            some = data["lengths"][name]
            lines.append(f"  {name:<20}" + "".join(f"{value:>9.0f}" for value in some.values()))
        lines += ["", "the longer reply is      chosen  rejected  neither"]
        bias = data["length_bias"]
        for name, some in [("all", bias), *bias["by_task"].items()]:
            shares = (some["chosen_longer"], some["rejected_longer"], some["equal"])
            lines.append(f"  {name:<20}" + "".join(f"{share:>9.1%}" for share in shares))
    lines += ["", "flaws"]
    for name in ("duplicates", "identical_sides", "empty_replies", "not_text", "ties"):
        lines.append(f"  {name.replace('_', ' '):<24}{data[name]:>6}  dropped")
    twos = data["contradictions"]
    lines.append(f"  {'contradicting pairs':<24}{len(twos):>6}  kept" + _first_ids(twos))
    lines += ["", f"dropped: {data['dropped']['total']}, by reason and row number"]
    for entry in data["dropped"]["by_reason"]:
        lines.append(f"  {entry['count']} x {entry['reason']}")
        for source, rows in entry["rows"].items():
            lines.append(f"      {source}: " + _cut_list([str(one["row"]) for one in rows]))
    for one in data["contamination"]:
        prompts = f"{_count(one['prompts'], 'prompt')}, {one['unread']} rows without"
        lines += ["", f"contamination against {one['against']} ({prompts})"]
        for name, told in (("exact", "same last user message"), ("runs", f"a run of {RUN} words in common")):
            lines.append(f"  {told:<28}{len(one[name]):>6} of {n}")
            for file in dict.fromkeys(match["file"] for match in one[name]):
                rows = [str(match["row"]) for match in one[name] if match["file"] == file]
                lines.append(f"      {file}: " + _cut_list(rows))
    for number, example in enumerate(data["examples"], 1):
        title = f"{example['id']}, {example['side']}, task {example['task']}"
        lines += [
            "",
            f"--- judging prompt {number} of {len(data['examples'])}: {title} ---",
            _prompt(example["segments"], whole=number == 1),
        ]
    return _UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", "\n".join(lines)) + "\n"


def _count(n: int, word: str) -> str:
    return f"{n} {word}" + ("" if n == 1 else "s")


def _listed(counts: dict[str, int]) -> str:
    return _cut_list([f"{name} {count}" for name, count in counts.items()])


def _cut_list(items: Sequence[str]) -> str:
    rest = len(items) - _SHOWN_ROWS
    return ", ".join(items[:_SHOWN_ROWS]) + (f" and {rest} more (--json lists all)" if rest > 0 else "")


def _first_ids(twos: Sequence[Sequence[str]]) -> str:
    return ": " + _cut_list([" and ".join(two) for two in twos]) if twos else ""


def _prompt(pieces: Sequence[dict[str, Any]], whole: bool) -> str:
    """Segments put together; long contents cut, and the protocol's own words only in the first prompt shown."""
    texts = []
    for place, piece in enumerate(pieces):
        text = piece["text"]
        if piece["content"] and len(text) > _SHOWN_CHARACTERS + 100:
            half = _SHOWN_CHARACTERS // 2
            text = f"{text[:half]}\n[... {len(text) - 2 * half} characters not shown ...]\n{text[-half:]}"
        elif place == 0 and not whole and text.count("\n") > 2:
            first, last = text.split("\n", 1)[0], text.rstrip("\n").rsplit("\n", 1)[-1]
            text = f"{first}\n[... instructions as above ...]\n{last}\n"
        texts.append(text)
    return "".join(texts).rstrip("\n")
