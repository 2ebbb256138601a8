"""Layouts with several rated responses: a list of them in each row, or one rated response a row."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from patarm_lite.pairs.chats import kind
from patarm_lite.pairs.fields import Draft, Drafts, Fields, Layout, fold, left_over, missing, number, prompt_of
from patarm_lite.pairs.files import Row

ONE_A_ROW = "one rated response a row"
_TEXT_KEYS = ("response", "text", "content", "completion", "answer", "output", "generated_text")
_SCORE_KEYS = ("score", "rating", "overall_score", "helpfulness", "rank")


def rated_layout(
    records: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    fields: Fields,
    mapping: Mapping[str, str],
    where: str,
    min_gap: float,
) -> Layout | None:
    """The layout of a source with rated responses, or None. A pair's ratings differ by at least `min_gap`."""
    if "prompt" not in fields:
        return None
    used = ("prompt", "input", "system", "task", "id", "source", "reference")
    kept = {name: fields[name] for name in used if name in fields}
    makes = f"every two responses whose ratings differ by at least {min_gap:g} make a pair"
    if "responses" in fields and "response" not in mapping:
        lists = [record[fields["responses"]] for record in records if isinstance(record.get(fields["responses"]), list)]
        rated = any(isinstance(item, dict) for items in lists for item in items)
        if lists and (rated or "scores" in fields):
            kept["responses"] = fields["responses"]
            if not rated:
                kept["scores"] = fields["scores"]
            return Layout("rated responses", kept, makes, lambda row: rated_responses(row, kept, min_gap))
    if {"response", "score"} <= fields.keys():
        kept |= {"response": fields["response"], "score": fields["score"], "responses": _GROUP}
        shown = {name: column for name, column in kept.items() if name != "responses"}
        makes = f"rows of one prompt are put together, and {makes}"
        return Layout(ONE_A_ROW, shown, makes, lambda row: rated_responses(row, kept, min_gap))
    return None


_GROUP = "\x00responses"
"""The made-up column that holds the responses of rows put together."""


def grouped_by_prompt(rows: Sequence[Row], fields: Fields) -> list[Row]:
    """Rows with one rated response each -> one row a prompt, numbered as its first; other rows as they are."""
    groups: dict[str, Row] = {}
    out: list[Row] = []
    for row in rows:
        if not isinstance(row.value, dict) or not {fields["prompt"], fields["response"]} <= row.value.keys():
            out.append(row)
            continue
        parts = [row.value.get(fields[name]) for name in ("prompt", "input", "system") if name in fields]
        key = json.dumps(parts, sort_keys=True, default=str)
        if key not in groups:
            groups[key] = Row(row.number, {**row.value, _GROUP: []})
            out.append(groups[key])
        rated = {"response": row.value[fields["response"]], "score": row.value.get(fields["score"])}
        groups[key].value[_GROUP].append(rated)
    return out


def rated_responses(row: Mapping[str, Any], fields: Fields, min_gap: float) -> Drafts:
    """Several rated responses: every two whose ratings differ by at least `min_gap`. A `rank` counts downwards."""
    prompt = prompt_of(row, fields)
    if isinstance(prompt, str):
        return prompt
    lacking = missing(row, fields, *(name for name in ("responses", "scores") if name in fields))
    if lacking:
        return lacking
    items = row[fields["responses"]]
    if not isinstance(items, list):
        return f"the responses are {kind(items)}, not a list"
    if "scores" in fields:
        scores = row[fields["scores"]]
        if not isinstance(scores, list) or len(scores) != len(items):
            return "the responses and their ratings are not lists of one length"
        down = -1.0 if fold(fields["scores"]) == "ranks" else 1.0
        rated = [(item, number(score), down) for item, score in zip(items, scores, strict=True)]
    else:
        rated = [_rated_item(item) for item in items]
    out: list[Draft | str] = []
    fine = [(text, down * score) for text, score, down in rated if score is not None]
    out += ["a response has no rating"] * (len(rated) - len(fine))
    if len(fine) < 2:
        return "fewer than two rated responses"
    rest = left_over(row, fields, frozenset({fields.get("response", ""), fields.get("score", "")}))
    for i, (text_i, score_i) in enumerate(fine):
        for text_j, score_j in fine[i + 1 :]:
            if abs(score_i - score_j) < min_gap:
                out.append("tie" if score_i == score_j else f"the ratings differ by less than {min_gap:g}")
                continue
            best, other = ((text_i, score_i), (text_j, score_j))[:: 1 if score_i > score_j else -1]
            out.append(Draft(prompt, best[0], other[0], rest | {"chosen_score": best[1], "rejected_score": other[1]}))
    return out


def _rated_item(item: Any) -> tuple[Any, float | None, float]:
    if not isinstance(item, dict):
        return item, None, 1.0
    text = next((item[key] for key in _TEXT_KEYS if key in item), None)
    key = next((key for key in _SCORE_KEYS if number(item.get(key)) is not None), None)
    return text, number(item[key]) if key else None, -1.0 if key == "rank" else 1.0
