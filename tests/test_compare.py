"""Comparing judges: differences by hand, where they disagree, judgements side by side."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from patarm_lite.cli import main
from patarm_lite.errors import UserError
from patarm_lite.evals.audit_page import compare_page
from patarm_lite.evals.compare import LONGEST, compare_answers, compare_pairs, markdown, rendered
from patarm_lite.evals.items import Answer, BenchItem
from patarm_lite.evals.llmbar import LLMBAR
from patarm_lite.evals.rm_bench import RM_BENCH
from patarm_lite.records import JudgedPair, Pair, Turn, Verdict, Vote


def judged(*gaps: int) -> list[JudgedPair]:
    side = lambda score: (Vote(Verdict(score), f"judgement {score}"),)  # noqa: E731
    return [
        JudgedPair(Pair((Turn("user", str(i)),), "a", "b", id=str(i)), side(5 + gap), side(5))
        for i, gap in enumerate(gaps)
    ]


def test_a_difference_its_outcomes_and_examples_by_hand() -> None:
    found = compare_pairs([("A", judged(1, -1, 0, 2)), ("B", judged(1, 4, 1, -1))])
    one = found["against"][0]
    assert one["difference"]["value"] == pytest.approx((0 + 1 + 0.5 - 1) / 4)
    assert one["outcomes"]["wrong"]["right"] == 1 and one["outcomes"]["right"]["wrong"] == 1 and one["disagree"] == 0.75
    assert (one["better"], one["worse"]) == (2, 1)
    assert [example["id"] for example in one["examples"]] == ["1", "3", "2"]  # 5, 3 and 1 points apart
    assert [example["a"] for example in one["examples"]] == ["wrong", "right", "tie"]
    chosen = one["examples"][0]["responses"][0]
    assert (chosen["name"], chosen["text"], chosen["a"]["score"], chosen["b"]["score"]) == ("chosen", "a", 4.0, 9.0)
    assert chosen["b"]["judgement"] == "judgement 9"


def test_a_judge_does_not_differ_from_itself() -> None:
    one = compare_pairs([("A", judged(1, -1, 0)), ("B", judged(1, -1, 0))])["against"][0]
    assert (one["difference"]["value"], one["disagree"], one["examples"]) == (0, 0, [])
    beyond = 1 - 0.025 ** (1 / 3)  # of pairs like these three, so many may come out otherwise
    assert (one["difference"]["low"], one["difference"]["high"]) == pytest.approx((-beyond, beyond))


def test_other_pairs_are_refused() -> None:
    with pytest.raises(UserError, match="same pairs"):
        compare_pairs([("A", judged(1, 2)), ("B", judged(1))])


def test_kinds_of_pairs_with_few_prompts_have_no_interval_and_the_others_hold_together() -> None:
    gaps = [1, -1, 2, -2, 1, 1, -1, 2, 1, -1, 1, 1]
    a, b = judged(*gaps), judged(*[-gap for gap in gaps])
    for number in (0, 1):
        a[number] = JudgedPair(Pair(a[number].pair.prompt, "a a", "b", "code"), a[number].chosen, a[number].rejected)
        b[number] = JudgedPair(a[number].pair, b[number].chosen, b[number].rejected)
    where = compare_pairs([("A", a), ("B", b)])["against"][0]["where"]
    assert where["task=code"] == {"n": 2, "difference": None}
    assert where["task=chat"]["n"] == 10 and where["task=chat"]["difference"]["value"] == pytest.approx((3 - 7) / 10)


def test_the_words_say_how_many_where_and_which() -> None:
    text = markdown(rendered(compare_pairs([("A", judged(1, -1, 0, 2)), ("B", judged(1, 4, 1, -1))]), ["free", "free"]))
    assert "4 pairs, judged by all; decoding: free" in text
    assert "B against A: another outcome in 3 of 4 pairs; it alone is right in 2, A alone in 1." in text
    assert "e.g. 1: wrong (4.00 against 5.00), then right (9.00 against 5.00): 1" in text
    mixed = rendered(compare_pairs([("A", judged(1)), ("B", judged(1))]), ["free", "constrained"])
    assert mixed["about"] == "1 pairs, judged by all; decoding: A free, B constrained"


# --- benchmarks ---


def item(number: int, subset: str = "Natural", label: str = "1") -> BenchItem:
    prompt = (Turn("user", f"<b>prompt {number}</b>"),)
    return BenchItem(f"{subset}/{number}", subset, label, prompt=prompt, responses=("first", "<script>x</script>"))


def answers(*scores: tuple[float | None, float | None]) -> list[Answer]:
    return [Answer(item(number), two) for number, two in enumerate(scores)]


def votes_of(judge: int, benchmark: str, item: str, place: int) -> tuple[Vote, ...]:
    return (Vote(Verdict(5), f"<i>judge {judge} of {benchmark} {item} {place}</i> " + "x" * 2 * LONGEST),)


def test_disagreements_on_a_benchmark_are_counted_and_shown_with_judgements() -> None:
    before, after = answers((8, 5), (5, 8), (4, 4), (9, 1)), answers((8, 5), (9, 3), (5, 4), (None, 1))
    found = compare_answers([("A", [(LLMBAR, before)]), ("B", [(LLMBAR, after)])], judgements=votes_of)
    row = found["against"][0]["benchmarks"]["llmbar"]
    assert (row["comparisons"], row["other_order"]) == (4, 3)
    assert row["subset"]["Natural"] == {"items": 4, "comparisons": 4, "other_order": 3}
    assert row["value"] == pytest.approx((1 + 1 + 1 + 0.5) / 4 - (1 + 0 + 0.5 + 1) / 4)
    examples = found["against"][0]["examples"]
    assert [example["id"] for example in examples] == ["LLMBar, Natural/1", "LLMBar, Natural/2"]  # 9 and 1 points apart
    first = examples[0]
    assert (first["a"], first["b"], first["truth"]) == ("response 2 higher", "response 1 higher", "label 1")
    assert first["responses"][1]["b"]["judgement"].startswith("<i>judge 1 of llmbar Natural/1 1</i>")
    assert len(first["responses"][1]["b"]["judgement"]) < LONGEST + 50
    page = compare_page(rendered(found, ["free", "free"]))
    assert "&lt;i&gt;judge 1 of llmbar Natural/1 1&lt;/i&gt;" in page
    assert "<script" not in page and "<i>" not in page and "<b>prompt" not in page
    text = markdown(rendered(found, ["free", "free"]))
    named = "LLMBar (in part: 4 of 419 items, no Neighbor, GPTInst, GPTOut, Manual)"
    assert f"{named}, B against A: 3 of 4 comparisons of a right with a wrong response came out otherwise." in text
    assert f"| {named} | B | 87.5 |" in text and "LLMBar |" not in text
    assert page.count(f">{named}") == 2 and page.count("LLMBar (in part), n 4") > 0
    assert not re.search("LLMBar(?! \\(|, Natural)", page)  # nowhere as if it were whole


def test_what_there_is_of_a_benchmark_is_said_as_it_was_loaded() -> None:
    judges = [(name, [(LLMBAR, answers((8, 5)))]) for name in ("A", "B")]
    foreign = {"llmbar": "not the official items: 1 drawn of others"}
    text = markdown(rendered(compare_answers(judges, parts=foreign), ["free", "free"]))
    assert "| LLMBar (not the official items: 1 drawn of others) | A |" in text
    assert "| LLMBar | A |" in markdown(rendered(compare_answers(judges, parts={"llmbar": None}), ["free", "free"]))


def test_the_order_of_right_responses_among_themselves_is_no_disagreement_nor_is_that_of_wrong_ones() -> None:
    one = BenchItem("chat/1", "chat", correct=3, responses=tuple("abcdef"))
    before, after = Answer(one, (9, 8, 7, 1, 2, 3)), Answer(one, (7, 8, 9, 3, 2, 1))
    found = compare_answers([("A", [(RM_BENCH, [before])]), ("B", [(RM_BENCH, [after])])])
    row = found["against"][0]["benchmarks"]["rm-bench"]
    assert (row["comparisons"], row["other_order"], found["against"][0]["examples"]) == (9, 0, [])


def test_other_items_are_refused() -> None:
    with pytest.raises(UserError, match="are not of the same items of LLMBar"):
        compare_answers([("A", [(LLMBAR, answers((1, 2)))]), ("B", [(LLMBAR, answers((1, 2), (3, 4)))])])


# --- through the front door ---

QUICK = ["--threads", "1", "--context", "1500", "--max-tokens", "100", "--k", "3"]


@pytest.fixture(scope="module")
def benched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two judges, twelve items of LLMBar, a store, and what `bench` made of them."""
    pytest.importorskip("llama_cpp")
    from little_gguf import write_little_gguf

    folder = tmp_path_factory.mktemp("compared")
    rows = [
        {"input": f"Name {n} things.", "output_1": f"Thing {n}.", "output_2": "No.", "label": 1 + n % 2}
        for n in range(12)
    ]
    (folder / "llmbar-Natural.json").write_text(json.dumps(rows))
    for seed in (0, 1):
        (folder / str(seed)).mkdir()
        judge = write_little_gguf(folder / str(seed), seed=seed)
        judge.rename(folder / f"{seed}.gguf")
        told = ["bench", str(folder / f"{seed}.gguf"), *on(folder), "-o", str(folder / f"bench{seed}")]
        assert main(told) == 0
    return folder


def on(folder: Path) -> list[str]:
    data = ["--on", "llmbar", "--data", str(folder / "llmbar-Natural.json"), "--store", str(folder / "votes.sqlite")]
    return [*data, *QUICK]


def test_judges_that_are_run_show_judgements_and_finished_folders_scores(
    benched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judges = [str(benched / f"{seed}.gguf") for seed in (0, 1)]
    assert main(["compare", *judges, *on(benched), "-o", str(tmp_path / "run")]) == 0
    out, err = capsys.readouterr()
    assert "judge 1 of 2" in err and "72 verdicts needed, 72 in the store, 0 to be drawn" in err
    assert "came out otherwise" in out and "e.g. LLMBar, Natural/" in out
    run = json.loads((tmp_path / "run" / "compare.json").read_text())
    assert main(["compare", *(str(benched / f"bench{seed}") for seed in (0, 1)), "--json"]) == 0
    folders = json.loads(capsys.readouterr().out)
    one, other = (found["against"][0]["benchmarks"]["llmbar"] for found in (run, folders))
    assert one == other and one["other_order"] > 0
    shown, bare = (found["against"][0]["examples"] for found in (run, folders))
    assert [example["id"] for example in shown] == [example["id"] for example in bare]
    assert "<score>" in shown[0]["responses"][0]["a"]["judgement"]
    assert bare[0]["responses"][0]["a"]["judgement"] is None and bare[0]["prompt"] == ""
    page = (tmp_path / "run" / "compare.html").read_text()
    assert "&lt;score&gt;" in page and not re.search(r"""(?:src|href)=["'](?!#)|@import|url\((?!#)""", page)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda folder: (folder / "verdicts-llmbar.jsonl").unlink(), "no file .*verdicts-llmbar.jsonl"),
        (lambda folder: (folder / "bench.json").write_text("{"), "has no bench.json that can be read"),
        (lambda folder: edit(folder, lambda rows: rows[1:]), "not of the same items of LLMBar"),
        (lambda folder: edit(folder, lambda rows: [*rows, rows[0]]), "line 13: item 'Natural/1' is there twice"),
        (lambda folder: edit(folder, lambda rows: [{**rows[0], "scores": [1]}, *rows[1:]]), "line 1: 1 scores, and"),
        (lambda folder: edit(folder, lambda rows: [{**rows[0], "fingerprint": "x"}, *rows[1:]]), "verdicts of 2"),
        (lambda folder: edit(folder, lambda rows: [without(rows[0]), *rows[1:]]), "line 1: 'fingerprint' is missing"),
        (lambda folder: other_items(folder), "are not of the same items; run bench on the same"),
    ],
)
def test_a_damaged_folder_of_bench_is_one_line(
    change: Any, told: str, benched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        for file in (benched / f"bench{seed}").iterdir():
            (tmp_path / str(seed) / file.name).write_text(file.read_text())
    change(tmp_path / "1")
    assert main(["compare", str(tmp_path / "0"), str(tmp_path / "1"), "-o", str(tmp_path / "out")]) == 2
    assert re.fullmatch(rf"error: [^\n]*{told}[^\n]*\n", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def edit(folder: Path, change: Any) -> None:
    file = folder / "verdicts-llmbar.jsonl"
    rows = change([json.loads(line) for line in file.read_text().splitlines()])
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def without(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "fingerprint"}


def other_items(folder: Path) -> None:
    known = json.loads((folder / "bench.json").read_text())
    known["benchmarks"]["llmbar"]["sha256"] = "0" * 64
    (folder / "bench.json").write_text(json.dumps(known))
