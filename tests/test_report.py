"""The report of a run folder whose files are written by hand: every number on the page is one that stands here."""

from __future__ import annotations

import json
import os
import re
import stat
from html.parser import HTMLParser

import pytest

from patarm_lite.errors import UserError
from patarm_lite.report import write_report

HOSTILE = '<script>alert(1)</script><img src=https://evil.example/x.png onerror="a()"></pre></blockquote>\ud800'
JUDGEMENT = (
    "<generated_rubrics>\ntone (2): is {}\n</generated_rubrics>\n<eval>\ntone: ok (5)\n</eval>\n<score>{}</score>"
)

MINUS = "\N{MINUS SIGN}"

RECIPE = """\
name: tiny
method: par
model: {base: arena}
sft: {source: arena}
arena: {bias: 0.75}
"""


def pair(name, chosen, rejected, task="chat"):
    prompt = [{"role": "user", "content": f"prompt of {name}"}]
    texts = {"chosen": chosen, "rejected": rejected}
    return {"id": name, "task": task, "prompt": prompt, **texts, "source": "arena", "meta": {"gap": 1}}


def vote(name, side, index, score):
    return {
        "pair": name,
        "side": side,
        "vote": index,
        "score": score,
        "problem": None if score else "truncated",
        "faults": ["criteria_count"] if score else [],
        "rubric": [],
        "criterion_scores": [],
        "expected": None,
        "mass": None,
        "tokens": 58,
        "text": JUDGEMENT.format(f"{name} {side} {index}", score) if score else "<generated_rubrics>\ncut off",
    }


def votes(scores):
    """Lines of heldout_*.jsonl from {pair: (scores of the chosen, scores of the rejected)}."""
    return [
        vote(name, side, index, score)
        for name, both in scores.items()
        for side, own in zip(("chosen", "rejected"), both, strict=True)
        for index, score in enumerate(own)
    ]


PAIRS = [pair("p1", "one two three", "one"), pair("p2", "one", "one two"), pair("p3", "one", "two", "math")]
BEFORE = {"p1": ([9, 8], [2, 2]), "p2": ([3, 3], [8, 7]), "p3": ([5, 5], [5, None])}
AFTER = {"p1": ([9, 9], [2, 2]), "p2": ([8, 9], [3, 3]), "p3": ([7, 7], [4, 4])}
STEPS = [
    {"stage": "sft", "step": 1, "loss": 3.0, "seconds": 0.3},
    {"stage": "sft", "step": 2, "loss": 1.0, "seconds": 0.3},
    *(
        {
            **{"stage": "grpo", "step": step, "seconds": 0.9, "loss": 0.0, "reward": reward, "preference": reward},
            **{"format": 0.0, "win_share": win, "distance": 1.0, "dead_groups": 0.25, "unreadable": 0.02},
            **{"faulty": 0.01, "length": 58.0},
        }
        for step, reward, win in [(1, 0.5, 0.625), (2, 0.9, 0.875)]
    ),
]
MEASURES = {
    "before": {
        **{"accuracy": 0.641, "low": 0.611, "high": 0.672, "accuracy_mean2": 0.682, "accuracy_readable": 0.66},
        **{"accuracy_mean2_low": 0.655, "accuracy_mean2_high": 0.71, "accuracy_expected": None, "ties": 0.105},
        **{"unreadable": 0.027, "problems": {"truncated": 7}, "faulty": 0.4, "spearman_quality": 0.372},
        **{"spearman_length": 0.817, "tokens_mean": 58.2, "detection": {"color": 0.891}, "detection_mean": 0.943},
        "rows": {"task=chat": {"n": 2, "accuracy": 0.512, "low": 0.401, "high": 0.623, "ties": 0.1}},
    },
    "after": {
        **{"accuracy": 0.943, "low": 0.926, "high": 0.958, "accuracy_mean2": 0.961, "accuracy_readable": 0.945},
        **{"accuracy_mean2_low": 0.945, "accuracy_mean2_high": 0.975, "accuracy_expected": None, "ties": 0.072},
        **{"unreadable": 0.003, "problems": {}, "faulty": 0.0, "spearman_quality": 0.912},
        **{"spearman_length": 0.09, "tokens_mean": 57.9, "detection": {"color": 0.907}, "detection_mean": 0.93},
        "rows": {"task=chat": {"n": 2, "accuracy": 0.987, "low": 0.951, "high": 1.0, "ties": 0.031}},
    },
}
FILES = {
    "run.json": {
        **{"schema": 1, "status": "finished", "name": "tiny", "seed": 7, "engine": "transformers"},
        **{"versions": {"torch": "2.13.0"}, "hashes": {"heldout.jsonl": "c0ffee"}, "command": "patarm-lite train tiny"},
        "stages": {"sft": {"seconds": 301.0, "cpu_seconds": 590.0}, "grpo": {"seconds": 99.0, "cpu_seconds": 120.5}},
        **{"parameters": 296640, "data": {"train": 2000}},
    },
    "summary.json": {
        **{"schema": 1, "name": "tiny", "method": "par", "seed": 7, "minutes": 9.4, "cpu_seconds": 711},
        "heldout": {"n": 3, "decoding": "free", "votes": 2, **MEASURES},
    },
    "recipe.yaml": RECIPE,
    "metrics.jsonl": STEPS,
    "samples.jsonl": [{"step": 2, "pair": "p9", "side": "chosen", "text": "sampled text", "score": 4, "reward": 1.2}],
    "heldout.jsonl": PAIRS,
    "heldout_before.jsonl": votes(BEFORE),
    "heldout_after.jsonl": votes(AFTER),
}


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name, content in FILES.items():
        write(folder / name, content)
    return folder


def write(path, content):
    if isinstance(content, list):
        path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


class Page(HTMLParser):
    """What a browser would see: elements with attributes, and text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.attributes, self.open = [], "", [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in ("meta", "use", "path", "img", "rect", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        if tag not in ("use", "path"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += re.sub(r"\s+", " ", data) + "|"


def page(run):
    return Page(write_report(run).read_text(encoding="utf-8"))


def table_rows(run):
    """Every table row of the report: its first cell -> the texts of the others."""
    rows = re.findall(r"<tr>(.*?)</tr>", write_report(run).read_text(encoding="utf-8"), re.S)
    stripped = [[re.sub("<[^>]*>", "", cell) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row)] for row in rows]
    return {row[0]: row[1:] for row in reversed(stripped)}


# --- what is on the page ---


def test_the_report_is_one_file_beside_the_run_and_a_second_one_replaces_it(run):
    first = write_report(run)
    assert first == run / "report.html"
    assert sorted(os.listdir(run)) == sorted([*FILES, "report.html"])
    assert stat.S_IMODE(first.stat().st_mode) == 0o644
    content = first.read_bytes()
    assert write_report(run).read_bytes() == content
    assert sorted(os.listdir(run)) == sorted([*FILES, "report.html"])


def test_the_table_gives_before_after_and_change_with_intervals(run):
    rows = table_rows(run)
    before, after, change = rows["Accuracy, one judgement"]
    assert (before, after) == ("0.641 [0.611, 0.672]", "0.943 [0.926, 0.958]")
    assert change.startswith("+0.302 [")
    assert rows["Accuracy, mean of 2"][:2] == ["0.682 [0.655, 0.710]", "0.961 [0.945, 0.975]"]
    assert rows["Unreadable judgements"] == ["2.7 %", "0.3 %", f"{MINUS}2.4 points"]
    assert rows["Rank correlation with response length"] == ["0.817", "0.090", f"{MINUS}0.727"]


def test_the_rows_the_detection_and_the_times_are_shown(run):
    rows = table_rows(run)
    assert rows["chat"][:3] == ["2", "0.512 [0.401, 0.623]", "0.987 [0.951, 1.000]"]
    assert rows["color"] == ["0.891", "0.907", "+0.016"]
    assert rows["sft"] == ["5 min 01 s", "9 min 50 s", "75.2 %"]  # 301 of 400 s
    assert rows["grpo"] == ["99.0 s", "2 min 00 s", "24.8 %"]
    assert rows["truncated: the judgement stopped before its end token"] == ["7", "0"]
    assert rows["criteria_count: the rubric does not have 3 to 5 criteria"] == ["11", "12"]


def test_captions_say_n_the_votes_the_decoding_and_the_rule_of_length(run):
    text = page(run).text
    assert "n = 3 held-out pairs, 2 judgements a side, decoding: free" in text
    assert "The rule “the longer one wins” gets 0.500" in text  # right, wrong, equal
    assert "method par · seed 7 · 9.4 minutes · status finished" in text


def test_the_pairs_are_cross_tabulated_by_the_first_judgement_of_each_side(run):
    """p1 stays right, p2 was wrong and p3 tied; all are right after."""
    rows = table_rows(run)
    assert rows["before right"] == ["1", "0", "0", "0"]
    assert rows["before tie"] == ["1", "0", "0", "0"]
    assert rows["before wrong"] == ["1", "0", "0", "0"]


def test_judgements_of_the_same_pair_and_side_stand_side_by_side(run):
    html = write_report(run).read_text(encoding="utf-8")
    card = next(card for card in html.split("<article>") if "pair p2" in card)
    assert "wrong → right" in card and "chosen: 3 → 8; rejected: 8 → 3" in card
    assert "before: 3" in card and "after: 8" in card
    assert card.count("tone (2): is p2 chosen 0") == 2


def test_an_arena_run_says_that_the_bias_was_planted_and_another_run_does_not(run):
    assert "planted on purpose by SFT (75.0 % of its teacher's overall score is length)" in page(run).text
    write(run / "recipe.yaml", RECIPE.replace("sft: {source: arena}", "sft: {source: file}"))
    assert "planted" not in page(run).text


def test_flipped_labels_are_said(run):
    write(run / "recipe.yaml", RECIPE + "data: {shuffle_labels: 0.5}\n")
    assert "Negative control: 50.0 % of the training labels were flipped." in page(run).text


def test_every_plot_has_a_text_alternative_with_its_numbers(run):
    found = page(run)
    alternatives = [value for name, value in found.attributes if name == "aria-label"]
    assert found.tags.count("svg") == len(alternatives) == 10  # seven panels of GRPO, SFT loss, two histograms
    assert (
        "training pairs from 0.625 to 0.875 over steps 1 to 2; held-out before 0.682; held-out after 0.961"
        in "".join(alternatives)
    )
    assert "9: 1 and 0" in next(text for text in alternatives if text.startswith("Scores before"))
    assert "9: 3 and 0" in next(text for text in alternatives if text.startswith("Scores after"))


def test_a_histogram_has_ten_bars_of_each_side(run):
    html = write_report(run).read_text(encoding="utf-8")
    for when in ("before", "after"):
        assert len(re.findall(rf'<path [^>]*clip-path="url\(#scores-{when}-\w+\)" style="fill: var', html)) == 20


def test_ids_of_two_plots_never_clash(run):
    ids = [value for name, value in page(run).attributes if name == "id"]
    assert ids and len(set(ids)) == len(ids)


# --- hostile texts ---


def hostile_files(value):
    """The same files with every text of others replaced."""
    rows = [{**row, "text": value} for row in FILES["heldout_before.jsonl"]]
    prompt = [{"role": value, "content": value}, {"role": "user", "content": value}]
    pairs = [{**p, "prompt": prompt, "chosen": value, "rejected": value, "task": value} for p in PAIRS]
    measures = MEASURES["before"] | {"rows": {f"task={value}": {"n": value}}, "problems": {value: 1}}
    measures |= {"detection": {value: 0.5}}
    return {
        "heldout.jsonl": pairs,
        "heldout_before.jsonl": rows,
        "heldout_after.jsonl": rows,
        "samples.jsonl": [{"step": value, "pair": value, "text": value, "response": value, "problem": value}],
        "run.json": dict.fromkeys(("status", "name", "command", "seed", value), value)
        | {key: {value: value} for key in ("versions", "hashes", "data", "stages")},
        "summary.json": {
            "name": value,
            "method": value,
            "heldout": {"n": value, "decoding": value, "before": measures},
        },
        "recipe.yaml": json.dumps({"name": value}),
        "metrics.jsonl": [{"stage": value, "step": 1, "loss": 1.0}],
    }


@pytest.mark.parametrize("missing", ["", "heldout_after.jsonl"])
def test_hostile_texts_are_shown_as_text_wherever_they_stand(run, missing):
    for name, content in hostile_files(HOSTILE).items():
        write(run / name, content)
    if missing:
        (run / missing).unlink()
    found = page(run)
    assert not {"script", "img", "link", "iframe", "object"} & set(found.tags)
    assert "<script>alert(1)</script>" in found.text
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    assert found.open == []


def test_nothing_is_loaded_from_anywhere(run):
    html = write_report(run).read_text(encoding="utf-8")
    assert "http://" not in html and "https://" not in html
    found = Page(html)
    assert not [value for name, value in found.attributes if name in ("src", "href", "xlink:href") and value[0] != "#"]
    assert "@import" not in html and not re.search(r"url\((?!#)", html)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in found.attributes


def test_a_dollar_sign_or_brace_in_a_name_is_not_markup(run):
    write(run / "metrics.jsonl", [{"stage": "$x_{", "step": 1, "loss": 1.0}])
    write(run / "recipe.yaml", "name: '{title}'\n")
    assert "Loss ($x_{)" in page(run).text


# --- a run that stopped early ---


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named_and_the_rest_is_shown(run, name):
    (run / name).unlink()
    assert f"Missing in the run folder, so not shown: {name}." in page(run).text


@pytest.mark.parametrize("name", FILES)
def test_one_file_alone_makes_a_report(tmp_path, name):
    write(tmp_path / name, FILES[name])
    assert page(tmp_path).open == []


def test_without_a_summary_the_figures_are_counted_from_the_judgements(run):
    """p1 wins twice, p2 loses twice, p3 ties once and is unreadable once: 2.5 of 6, and 1 of 12 unreadable."""
    (run / "summary.json").unlink()
    rows = table_rows(run)
    assert rows["Accuracy, one judgement"][0].startswith("0.417 [")
    assert rows["Unreadable judgements"][0] == "8.3 %"
    assert rows["Accuracy, one judgement"][2].startswith("+0.583 [")


def test_a_run_stopped_in_training_shows_its_curves_and_its_last_samples(tmp_path):
    write(tmp_path / "metrics.jsonl", STEPS)
    write(tmp_path / "samples.jsonl", FILES["samples.jsonl"])
    found = page(tmp_path)
    assert found.tags.count("svg") == 8
    assert "sampled text" in found.text and "From step 2, the last one sampled." in found.text


def test_broken_lines_and_numbers_that_are_none_are_counted_and_left_out(run):
    lines = [json.dumps(row) for row in STEPS]
    lines.insert(0, '{"stage": "sft", "step": 1, "loss": NaN}')
    lines += ["[1, 2]", '{"stage": "grpo", "st']
    (run / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")
    found = page(run)
    assert "metrics.jsonl: 2 lines could not be read (first: line 6)." in found.text
    assert found.tags.count("svg") == 10
    alternatives = "".join(value for name, value in found.attributes if name == "aria-label")
    assert "Loss (sft): loss from 3 to 1 over steps 1 to 2" in alternatives


def test_judgements_that_do_not_fit_the_pairs_are_said_and_not_guessed(run):
    write(run / "heldout_after.jsonl", votes(AFTER)[:-1])
    text = page(run).text
    assert "heldout_after.jsonl: pair 'p3' has 2 votes on the chosen and 1 on the rejected side" in text
    assert "wrong → right" not in text


def test_a_damaged_json_or_recipe_is_said(run):
    (run / "run.json").write_text('{"schema": 1,', encoding="utf-8")
    (run / "recipe.yaml").write_text("a: [1", encoding="utf-8")
    text = page(run).text
    assert "run.json is not JSON" in text and "recipe.yaml is not YAML" in text


@pytest.mark.parametrize(
    ("name", "message"), [("nowhere", "no such folder"), ("file", "no such folder"), ("", "none of")]
)
def test_what_is_no_run_folder_is_refused(tmp_path, name, message):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=message):
        write_report(tmp_path / name if name else tmp_path)


def test_a_report_that_cannot_be_written_is_one_clear_line_and_leaves_nothing_behind(run):
    (run / "report.html").mkdir()
    with pytest.raises(UserError, match=r"report\.html can't be written: Is a directory"):
        write_report(run)
    assert sorted(os.listdir(run)) == sorted([*FILES, "report.html"])
