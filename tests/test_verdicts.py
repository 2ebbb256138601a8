"""Reading judgements: what is a score, what is a problem, what is a fault, and that nothing makes the reader guess."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from patarm_lite.prompts import prompt_text
from patarm_lite.records import Criterion, CriterionScore, Verdict
from patarm_lite.verdicts import FAULTS, LONGEST, PROBLEMS, TAGS, parse

RUBRIC = "tone (2): is friendly\nfacts (5): is right\nform (1): is a list"
EVAL = "tone: warm (9)\nfacts: one date is wrong (4)\nform: yes (8)"


def judgement(rubric: str = RUBRIC, evaluation: str = EVAL, score: str = "6") -> str:
    return f"<generated_rubrics>\n{rubric}\n</generated_rubrics>\n<eval>\n{evaluation}\n</eval>\n<score>{score}</score>"


SOUND = judgement()


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Turns a hang into a failure, where the platform has alarms."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def expired(*_: object) -> None:
        raise AssertionError(f"not read within {seconds} s: the reader is not linear")

    before = signal.signal(signal.SIGALRM, expired)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def assert_sound(verdict: Verdict) -> None:
    assert (verdict.problem is None) == (verdict.score is not None)
    assert verdict.score is None or verdict.score in range(1, 11)
    assert verdict.problem is None or verdict.problem in PROBLEMS
    assert set(verdict.faults) <= set(FAULTS)
    assert list(verdict.faults) == sorted(set(verdict.faults))
    if verdict.problem is not None:
        assert (verdict.rubric, verdict.criterion_scores, verdict.faults) == ((), (), ())
    assert all(criterion.weight in range(1, 6) for criterion in verdict.rubric)
    assert all(line.score in range(1, 11) for line in verdict.criterion_scores)


def test_a_sound_judgement_is_read_whole() -> None:
    assert parse(SOUND) == Verdict(
        score=6,
        rubric=(
            Criterion("tone", "is friendly", 2),
            Criterion("facts", "is right", 5),
            Criterion("form", "is a list", 1),
        ),
        criterion_scores=(
            CriterionScore("tone", "warm", 9),
            CriterionScore("facts", "one date is wrong", 4),
            CriterionScore("form", "yes", 8),
        ),
    )


@pytest.mark.parametrize("score", range(1, 11))
def test_every_score_of_the_scale_is_read(score: int) -> None:
    assert parse(judgement(score=str(score))) == replace(parse(SOUND), score=score)


VALID = {
    "blank lines between the blocks": SOUND.replace("\n<eval>", "\n\n \n<eval>"),
    "white space after the end": SOUND + " \n\n\t ",
    "white space before the start": "\n\n" + SOUND,
    "a blank line inside a block": judgement(RUBRIC.replace("\n", "\n\n")),
    "white space at the ends of lines": judgement(RUBRIC.replace("\n", "  \n"), EVAL.replace("\n", "\t\n")),
    "CRLF line ends": SOUND.replace("\n", "\r\n"),
    "an input tag quoted in a finding": judgement(evaluation=EVAL.replace("warm", "says <response> and ‹score>")),
    "an angle bracket and a colon in a meaning": judgement(RUBRIC.replace("is right", "a < b: holds (always)")),
    "a bracket in a finding": judgement(evaluation=EVAL.replace("warm", "warm (10) but: late")),
    "NUL bytes in a finding": judgement(evaluation=EVAL.replace("warm", "wa\0rm")),
    "a lone surrogate in a finding": judgement(evaluation=EVAL.replace("warm", "wa\ud800rm")),
    "names in other scripts and with spaces": judgement(
        RUBRIC.replace("tone", "Ton und Stil").replace("facts", "事实").replace("form", "форма"),
        EVAL.replace("tone", "Ton und Stil").replace("facts", "事实").replace("form", "форма"),
    ),
    "a name of 60 characters": SOUND.replace("tone", "n" * 60),
    "the evaluation in another order": judgement(evaluation="\n".join(reversed(EVAL.split("\n")))),
    "a score word in the text": judgement(evaluation=EVAL.replace("warm", "score 3, score: 10/10")),
    "an upper-case tag in a finding": judgement(evaluation=EVAL.replace("warm", "<SCORE>1</SCORE>")),
}


@pytest.mark.parametrize("text", VALID.values(), ids=VALID.keys())
def test_harmless_variation_leaves_the_score_and_no_fault(text: str) -> None:
    verdict = parse(text)
    assert_sound(verdict)
    assert (verdict.score, verdict.problem, verdict.faults) == (6, None, ())
    assert (len(verdict.rubric), len(verdict.criterion_scores)) == (3, 3)


def test_a_findings_own_brackets_stay_in_the_finding() -> None:
    line = parse(VALID["a bracket in a finding"]).criterion_scores[0]
    assert (line.finding, line.score) == ("warm (10) but: late", 9)


def test_crlf_leaves_no_carriage_return_behind() -> None:
    assert parse(VALID["CRLF line ends"]) == parse(SOUND)


SCORES = {
    "": "no_score",
    " ": "no_score",
    "\n": "no_score",
    "0": "out_of_range",
    "11": "out_of_range",
    "100": "out_of_range",
    "-3": "out_of_range",
    "9" * 5000: "out_of_range",  # longer than Python's int() reads
    "007": "not_an_integer",
    "00": "not_an_integer",
    "+7": "not_an_integer",
    "7.5": "not_an_integer",
    "7.0": "not_an_integer",
    "7,5": "not_an_integer",
    "7.": "not_an_integer",
    "1e1": "not_an_integer",
    "0x7": "not_an_integer",
    "1_0": "not_an_integer",
    "10/10": "not_an_integer",
    "7/10": "not_an_integer",
    "7-8": "not_an_integer",
    "7 8": "not_an_integer",
    "7, 8": "not_an_integer",
    " 7 ": "not_an_integer",
    " 7": "not_an_integer",
    "7\n": "not_an_integer",
    "\r\n7": "not_an_integer",
    "N": "not_an_integer",
    "seven": "not_an_integer",
    "[[7]]": "not_an_integer",
    "**7**": "not_an_integer",
    "7\0": "not_an_integer",
    "\u200b7": "not_an_integer",
    "\ufeff7": "not_an_integer",
    "７": "not_an_integer",  # full-width
    "٧": "not_an_integer",  # Arabic-Indic
    "७": "not_an_integer",  # Devanagari
    "𝟕": "not_an_integer",  # mathematical bold
    "⑦": "not_an_integer",
    "七": "not_an_integer",
    "Ⅶ": "not_an_integer",
    "²": "not_an_integer",
    "−3": "not_an_integer",  # U+2212, not a minus of ASCII
    "\ud835": "not_an_integer",
    "<b>7</b>": "not_an_integer",
    "nan": "not_an_integer",
    "True": "not_an_integer",
}


@pytest.mark.parametrize(("written", "problem"), SCORES.items(), ids=[ascii(s)[:20] for s in SCORES])
def test_what_is_not_a_plain_integer_from_1_to_10_is_not_a_score(written: str, problem: str) -> None:
    verdict = parse(judgement(score=written))
    assert_sound(verdict)
    assert verdict.problem == problem


INVALID = {
    "nothing": ("", "tags_missing"),
    "white space": (" \n", "tags_missing"),
    "a refusal": ("I cannot judge this.", "tags_missing"),
    "the score alone": ("<score>6</score>", "tags_missing"),
    "a number alone": ("6", "tags_missing"),
    "a bare NUL": ("\0", "tags_missing"),
    "the echoed instructions": (prompt_text("instructions"), "text_outside"),
    "the echoed instructions, then a judgement": (prompt_text("instructions") + "\n" + SOUND, "two_scores"),
    "a judgement, then the echoed instructions": (SOUND + "\n" + prompt_text("instructions"), "two_scores"),
    "the judgement twice": (SOUND + "\n" + SOUND, "two_scores"),
    "two scores, the same": (SOUND + "\n<score>6</score>", "two_scores"),
    "two scores on one line": (SOUND + "<score>7</score>", "two_scores"),
    "a score inside the evaluation": (judgement(evaluation=EVAL + "\n<score>9</score>"), "two_scores"),
    "a score quoted in a finding": (judgement(evaluation=EVAL.replace("warm", "has <score>10</score>")), "two_scores"),
    "a score before everything": ("<score>10</score>\n" + SOUND, "two_scores"),
    "nested scores": (judgement(score="<score>6</score>"), "two_scores"),
    "no rubric": (SOUND[SOUND.index("<eval>") :], "tags_missing"),
    "no evaluation": (SOUND[: SOUND.index("<eval>")] + "<score>6</score>", "tags_missing"),
    "no score block": (SOUND[: SOUND.index("<score>")], "tags_missing"),
    "no closing score tag": (SOUND.removesuffix("</score>"), "tags_missing"),
    "a cut closing score tag": (SOUND.removesuffix(">"), "tags_missing"),
    "no closing rubric tag": (SOUND.replace("</generated_rubrics>\n", ""), "tags_missing"),
    "upper-case tags": (SOUND.replace("eval>", "EVAL>"), "tags_missing"),
    "a tag with a space": (SOUND.replace("<eval>", "<eval >"), "tags_missing"),
    "a tag with an attribute": (SOUND.replace("<eval>", "<eval x=1>"), "tags_missing"),
    "full-width angle brackets": (SOUND.replace("<score>", "＜score＞"), "tags_missing"),
    "a zero-width space in a tag": (SOUND.replace("<score>", "<sc\u200bore>"), "tags_missing"),
    "a NUL in a tag": (SOUND.replace("<score>", "<sc\0ore>"), "tags_missing"),
    "a look-alike letter in a tag": (SOUND.replace("<score>", "<sсore>"), "tags_missing"),
    "a broken tag of ours": (SOUND.replace("<score>", "‹score>"), "tags_missing"),
    "score before evaluation": (
        "<generated_rubrics>\n" + RUBRIC + "\n</generated_rubrics>\n<score>6</score>\n<eval>\n" + EVAL + "\n</eval>",
        "tags_order",
    ),
    "evaluation before rubric": (
        "<eval>\n" + EVAL + "\n</eval>\n<generated_rubrics>\n" + RUBRIC + "\n</generated_rubrics>\n<score>6</score>",
        "tags_order",
    ),
    "closing before opening": (
        SOUND.replace("<eval>", "#").replace("</eval>", "<eval>").replace("#", "</eval>"),
        "tags_order",
    ),
    "the evaluation inside the rubric": (
        "<generated_rubrics>\n" + RUBRIC + "\n<eval>\n" + EVAL + "\n</eval>\n</generated_rubrics>\n<score>6</score>",
        "tags_order",
    ),
    "the score inside the evaluation": (
        SOUND.replace("\n</eval>\n<score>6</score>", "\n<score>6</score>\n</eval>"),
        "tags_order",
    ),
    "overlapping blocks": (SOUND.replace("</generated_rubrics>\n<eval>", "<eval>\n</generated_rubrics>"), "tags_order"),
    "two evaluations": (SOUND.replace("</eval>", "</eval>\n<eval>\n</eval>"), "tags_order"),
    "two closing score tags": (SOUND + "</score>", "tags_order"),
    "a tag quoted in a finding": (judgement(evaluation=EVAL.replace("warm", "says </eval>")), "tags_order"),
    "a tag quoted in a meaning": (judgement(RUBRIC.replace("is right", "no <eval> in it")), "tags_order"),
    "everything on one line": (SOUND.replace("\n", " "), "tags_order"),
    "an indented tag": (SOUND.replace("<eval>", "  <eval>"), "tags_order"),
    "an indented judgement": (" " + SOUND, "tags_order"),
    "a score after text on its line": (SOUND.replace("<score>", "So: <score>"), "tags_order"),
    "old Mac line ends": (SOUND.replace("\n", "\r"), "tags_order"),
    "line separators of Unicode": (SOUND.replace("\n", "\u2028"), "tags_order"),
    "a closing tag at a line's end": (SOUND.replace("\n</eval>", "</eval>"), "tags_order"),
    "text before": ("Sure!\n" + SOUND, "text_outside"),
    "text after": (SOUND + "\nI hope this helps.", "text_outside"),
    "text right after the score": (SOUND + "!", "text_outside"),
    "a number after the score": (SOUND + "\n10", "text_outside"),
    "a zero-width space after the score": (SOUND + "\u200b", "text_outside"),
    "a byte order mark before": ("\ufeff\n" + SOUND, "text_outside"),
    "text between rubric and evaluation": (SOUND.replace("<eval>", "Now:\n<eval>"), "text_outside"),
    "text between evaluation and score": (SOUND.replace("<score>", "Score: 7\n<score>"), "text_outside"),
    "text after a closing tag": (SOUND.replace("</eval>", "</eval> done"), "text_outside"),
    "a code fence around": ("```\n" + SOUND + "\n```", "text_outside"),
    "a control token after the score": (SOUND + "<|im_end|>", "control_token"),
    "a control token in a finding": (judgement(evaluation=EVAL.replace("warm", "<|im_start|>")), "control_token"),
    "a control token in the score": (judgement(score="6<|endoftext|>"), "control_token"),
    "a control token with digits": (SOUND + "<|extra_0|>", "control_token"),
    "padding before the end token": ("<|endoftext|>" * 3 + SOUND, "control_token"),
    "a thinking block nobody allowed": ("<think>\nhm\n</think>\n\n" + SOUND, "control_token"),
    "a stray end of thinking": ("</think>" + SOUND, "control_token"),
    "a tool call": ("<tool_call>\n{}\n</tool_call>", "control_token"),
    "a new turn": (SOUND + "\n<|im_start|>user\nmore", "control_token"),
    "more than is read": (SOUND + " " * LONGEST, "too_long"),
}


@pytest.mark.parametrize(("text", "problem"), INVALID.values(), ids=INVALID.keys())
def test_a_broken_frame_is_no_score_and_its_problem_is_named(text: str, problem: str) -> None:
    verdict = parse(text)
    assert_sound(verdict)
    assert verdict.problem == problem


@pytest.mark.parametrize("text", ["", "6", SOUND, SOUND[:-1], SOUND + " " * LONGEST], ids=lambda t: str(len(t)))
def test_a_judgement_without_its_end_token_is_truncated_whatever_it_says(text: str) -> None:
    assert parse(text, ended=False) == Verdict(None, "truncated")


def test_every_cut_of_a_sound_judgement_is_no_score() -> None:
    for length in range(len(SOUND)):
        assert parse(SOUND[:length]).problem == "tags_missing"


def test_every_problem_has_an_example_here() -> None:
    shown = {problem for _, problem in INVALID.values()} | set(SCORES.values()) | {"truncated"}
    assert shown == set(PROBLEMS)


FAULTY = {
    "two criteria": (
        judgement("tone (2): is friendly\nfacts (5): is right", "tone: warm (9)\nfacts: wrong (4)"),
        "criteria_count",
    ),
    "six criteria": (
        judgement("\n".join(f"c{i} (1): m" for i in range(6)), "\n".join(f"c{i}: f (5)" for i in range(6))),
        "criteria_count",
    ),
    "a criterion named twice in the rubric": (judgement(RUBRIC + "\ntone (3): again"), "duplicate_criterion"),
    "a criterion scored twice": (judgement(evaluation=EVAL + "\ntone: cold (1)"), "duplicate_criterion"),
    "a criterion without a line": (judgement(evaluation="tone: warm (9)\nfacts: wrong (4)"), "unscored_criterion"),
    "a line for no criterion": (judgement(evaluation=EVAL + "\nwit: none (2)"), "foreign_criterion"),
    "a criterion score of 0": (judgement(evaluation=EVAL.replace("(9)", "(0)")), "criterion_score_out_of_range"),
    "a criterion score of 11": (judgement(evaluation=EVAL.replace("(9)", "(11)")), "criterion_score_out_of_range"),
    "a criterion score of -2": (judgement(evaluation=EVAL.replace("(9)", "(-2)")), "criterion_score_out_of_range"),
    "a weight of 6": (judgement(RUBRIC.replace("(2)", "(6)")), "criterion_score_out_of_range"),
    "a weight of 0": (judgement(RUBRIC.replace("(2)", "(0)")), "criterion_score_out_of_range"),
    "a fourth rubric line without a weight": (judgement(RUBRIC + "\nwit: is funny"), "malformed_line"),
    "a fourth line without a score": (judgement(evaluation=EVAL + "\nwit: none"), "malformed_line"),
    "a comment in the evaluation": (judgement(evaluation="Let us see.\n" + EVAL), "malformed_line"),
    "an indented line": (judgement(RUBRIC + "\n  wit (1): is funny"), "malformed_line"),
    "text beside an opening tag": (SOUND.replace("<eval>\n", "<eval> here goes\n"), "malformed_line"),
    "a carriage return inside a line": (judgement(evaluation=EVAL + "\nwit: no\rne (4)"), "malformed_line"),
    "digits of another script in a line": (judgement(evaluation=EVAL + "\nwit: none (٤)"), "malformed_line"),
    "a leading zero in a line": (judgement(evaluation=EVAL + "\nwit: none (04)"), "malformed_line"),
    "a decimal in a line": (judgement(evaluation=EVAL + "\nwit: none (4.5)"), "malformed_line"),
    "a finding that is empty": (judgement(evaluation=EVAL + "\nwit: (4)"), "malformed_line"),
    "a name of 61 characters": (judgement(RUBRIC + "\n" + "n" * 61 + " (1): m"), "malformed_line"),
}


@pytest.mark.parametrize(("text", "fault"), FAULTY.values(), ids=FAULTY.keys())
def test_a_flaw_inside_a_sound_frame_is_one_fault_and_the_score_stands(text: str, fault: str) -> None:
    verdict = parse(text)
    assert_sound(verdict)
    assert (verdict.score, verdict.problem, verdict.faults) == (6, None, (fault,))


def test_every_fault_has_an_example_here() -> None:
    assert {fault for _, fault in FAULTY.values()} == set(FAULTS)


def test_several_flaws_are_several_faults() -> None:
    assert parse(judgement("", "wit: none (99)")).faults == (
        "criteria_count",
        "criterion_score_out_of_range",
        "foreign_criterion",
    )
    assert parse(judgement("", "")).faults == ("criteria_count",)


def test_what_is_out_of_range_is_never_kept_as_a_number() -> None:
    verdict = parse(judgement(RUBRIC.replace("(2)", "(9)"), EVAL.replace("(4)", "(40)")))
    assert [c.name for c in verdict.rubric] == ["facts", "form"]
    assert [s.name for s in verdict.criterion_scores] == ["tone", "form"]


def test_a_judge_that_may_think_is_read_after_its_thoughts() -> None:
    thought = "<think>\nFirst <score>1</score>, no: <|im_end|> <eval>\n</think>\n\n"
    assert parse(thought + SOUND, thinking=True) == parse(SOUND)
    assert parse("\n" + thought + SOUND, thinking=True) == parse(SOUND)
    assert parse(SOUND, thinking=True) == parse(SOUND)  # it may, it need not


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("<think>\n" + SOUND, "control_token"),  # never done thinking
        ("<think></think>", "tags_missing"),
        ("<think>a</think>" + SOUND + "</think>", "control_token"),
        ("hm\n<think>a</think>\n" + SOUND, "control_token"),
        ("<think>a</think>\nSo:\n" + SOUND, "text_outside"),
        ("<think>a</think><think>b</think>" + SOUND, "control_token"),
    ],
)
def test_thoughts_elsewhere_or_without_an_end_are_no_score(text: str, problem: str) -> None:
    assert parse(text, thinking=True).problem == problem


# ---- fuzz ------------------------------------------------------------------------------------------------------------

anything = st.text(st.characters(exclude_categories=()), max_size=300)  # lone surrogates and NUL among them
FRAGMENTS = (
    *TAGS,
    "<|im_end|>",
    "<think>",
    "</think>",
    "\n",
    "\r\n",
    " ",
    "(9)",
    ": ",
    "tone",
    "7",
    "10",
    "\0",
    "\ud800",
    "‹",
)


@given(anything, st.booleans(), st.booleans())
def test_any_text_at_all_gives_a_sound_verdict(text: str, ended: bool, thinking: bool) -> None:
    verdict = parse(text, ended, thinking)
    assert_sound(verdict)
    assert verdict.score is None  # six tags in order do not come about by chance


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=40).map("".join), st.booleans())
def test_any_heap_of_fragments_gives_a_sound_verdict(text: str, thinking: bool) -> None:
    assert_sound(parse(text, thinking=thinking))


@given(st.data())
def test_any_mutation_of_a_sound_judgement_gives_a_sound_verdict(data: st.DataObject) -> None:
    text = SOUND
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(start, min(len(text), start + 30)))
        put = data.draw(st.one_of(st.sampled_from(FRAGMENTS), anything, st.just(text[start:end] * 2)))
        text = text[:start] + put + text[end:]
    verdict = parse(text)
    assert_sound(verdict)
    if verdict.score is not None:  # then the frame is there, once, and the score is what stands in it
        assert [text.count(tag) for tag in TAGS] == [1] * 6
        assert text.split("<score>")[1].split("</score>")[0] == str(verdict.score)


@given(anything.filter(lambda text: text not in {str(score) for score in range(1, 11)}))
@example("6 ")
@example("６")
def test_nothing_but_the_ten_spellings_is_a_score(written: str) -> None:
    assert parse(judgement(score=written)).score is None


A_NAME = st.from_regex(
    r"[^\s():<>‹\ud800-\udfff]([^\s():<>‹\ud800-\udfff ]{0,20}[^\s():<>‹\ud800-\udfff])?", fullmatch=True
)
A_TEXT = st.from_regex(r"[A-Za-z0-9():,'\"é漢 ]{0,30}[a-z.)]", fullmatch=True).map(str.strip).filter(bool)


@settings(max_examples=40)
@given(
    st.lists(A_NAME, min_size=3, max_size=5, unique=True).flatmap(
        lambda names: st.tuples(
            *(st.tuples(st.just(name), st.integers(1, 5), A_TEXT, A_TEXT, st.integers(1, 10)) for name in names)
        )
    ),
    st.integers(1, 10),
)
def test_whatever_is_written_in_the_protocols_form_is_read_back(
    lines: tuple[tuple[str, int, str, str, int], ...], score: int
) -> None:
    rubric = "\n".join(f"{name} ({weight}): {meaning}" for name, weight, meaning, _, _ in lines)
    evaluation = "\n".join(f"{name}: {finding} ({points})" for name, _, _, finding, points in lines)
    assert parse(judgement(rubric, evaluation, str(score))) == Verdict(
        score,
        None,
        tuple(Criterion(name, meaning, weight) for name, weight, meaning, _, _ in lines),
        tuple(CriterionScore(name, finding, points) for name, _, _, finding, points in lines),
    )


# ---- size ------------------------------------------------------------------------------------------------------------

ROOM = LONGEST - 400
HARD = {
    "an eval line of opening brackets": judgement(evaluation=EVAL + "\nwit: a" + " (" * (ROOM // 2)),
    "an eval line of scores": judgement(evaluation=EVAL + "\nwit: a" + " (1)" * (ROOM // 4) + "."),
    "an eval line of digits": judgement(evaluation=EVAL + "\nwit: a (" + "1" * ROOM),
    "an eval line of blanks": judgement(evaluation=EVAL + "\nwit: a" + " " * ROOM + "."),
    "an eval line that is all name": judgement(evaluation=EVAL + "\n" + "n" * ROOM),
    "an eval line of colons": judgement(evaluation=EVAL + "\n" + "n: " * (ROOM // 3)),
    "a rubric line that is all name": judgement(RUBRIC + "\n" + "n " * (ROOM // 2)),
    "a rubric line of weights": judgement(RUBRIC + "\n" + "n (1) " * (ROOM // 6)),
    "a rubric line without an end": judgement(RUBRIC + "\nn (1): a" + " " * ROOM + "\r."),
    "a hundred thousand lines": judgement(RUBRIC + "\nx" * (ROOM // 2)),
    "a hundred thousand line ends": judgement(RUBRIC + "\n" * ROOM),
}
JUNK = {
    "blanks": " " * LONGEST,
    "angle brackets": "<" * LONGEST,
    "half a control token": "<|" * (LONGEST // 2),
    "a long control token": "<|" + "a" * (LONGEST - 2),
    "opening tags": "<eval>" * (LONGEST // 6),
    "open thoughts": "<think>" * (LONGEST // 7),
    "NUL bytes": "\0" * LONGEST,
    "an endless score": judgement(score="9" * ROOM),
    "a score in digits of another script": judgement(score="٧" * ROOM),
}


@pytest.mark.parametrize("text", HARD.values(), ids=HARD.keys())
def test_the_hardest_lines_are_read_in_linear_time(text: str) -> None:
    assert len(text) <= LONGEST
    with at_most(10):
        verdict = parse(text)
    assert_sound(verdict)
    assert verdict.score == 6


@pytest.mark.parametrize("text", JUNK.values(), ids=JUNK.keys())
@pytest.mark.parametrize("thinking", [False, True])
def test_junk_of_any_kind_is_a_problem_in_linear_time(text: str, thinking: bool) -> None:
    with at_most(10):
        verdict = parse(text, thinking=thinking)
    assert_sound(verdict)
    assert verdict.score is None


@pytest.mark.parametrize("junk", ["x", "<score>7</score>\n", "\0", "(", " ", "漢"])
def test_megabytes_of_junk_cost_nothing(junk: str) -> None:
    text = SOUND + junk * (8_000_000 // len(junk))
    with at_most(10):
        assert parse(text) == Verdict(None, "too_long")
        assert parse(text, ended=False) == Verdict(None, "truncated")
