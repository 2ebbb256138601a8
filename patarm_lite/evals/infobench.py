"""InFoBench: 500 instructions, each taken apart into yes/no questions about the response, 2,250 in all.

Official: `evaluation.py` of qinyiwei/InfoBench. An evaluator (another model) is asked the questions of an instruction
one by one in a growing chat: the first message holds the material and the response, the later ones a question alone.
DRFR is the share of yes among all answers of all instructions (not a mean over instructions). An answer that can't be
read counts as no **and ends the instruction**: its later questions are never asked, and missing in the denominator.

Because of that a second figure stands beside it: a question that was not answered, or never asked, counts as no, and
the denominator is all questions.

What the evaluator is told stands in `prompt_texts/evaluator.txt`, in words of ours. So the figures of one evaluator can
be compared with each other, and not word by word with the published ones, which GPT-4 gave to other words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from patarm_lite.evals.items import FOREIGN, Record
from patarm_lite.evals.resampled import share_of
from patarm_lite.pairs.chats import kind
from patarm_lite.prompts import prompt_text
from patarm_lite.records import Turn

INSTRUCTIONS, QUESTIONS = 500, 2250
SUBSETS = ("Easy_set", "Hard_set")
OFFICIAL, ALL = "official", "all questions"
DRFR = "DRFR"


@dataclass(frozen=True, slots=True)
class InfobenchItem:
    """An instruction with its questions. `labels`: what each question is about (Content, Format, ...), if it is
    told."""

    id: str
    subset: str
    questions: tuple[str, ...]
    instruction: str = ""
    input: str = ""
    labels: tuple[tuple[str, ...], ...] = ()

    @property
    def prompt(self) -> str:
        """What the model is asked: the instruction, and the material behind it."""
        return f"{self.instruction}\n\n{self.input}" if self.input else self.instruction


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The evaluator's answers to an instruction's questions, in order; None could not be read. `questions`: how many
    there are, where that is known."""

    id: str
    subset: str
    answers: tuple[bool | None, ...]
    questions: int | None
    labels: tuple[tuple[str, ...], ...] = ()

    @property
    def asked(self) -> int:
        return len(self.answers)


def read_item(record: Record) -> InfobenchItem:
    """A record of the official data set.

    Raises:
        UserError: a field of another type, an unknown subset, no questions, labels of other questions.
    """
    given = record.row.get("input")
    if given is not None and not isinstance(given, str):
        raise record.wrong(f"'input' is {kind(given)}, not text")
    subset = record.text("subset")
    if subset not in SUBSETS:
        raise record.wrong(f"subset {subset[:30]!r} is none of {', '.join(SUBSETS)}")
    questions = questions_of(record)
    return InfobenchItem(
        record.name("id"), subset, questions, record.text("instruction"), given or "", labels_of(record, len(questions))
    )


def questions_of(record: Record) -> tuple[str, ...]:
    """The questions of a record.

    Raises:
        UserError: they are no list of texts, or none.
    """
    given = record.row["decomposed_questions"]
    if not isinstance(given, list):
        raise record.wrong(f"'decomposed_questions' is {kind(given)}, not a list")
    return record.texts("decomposed_questions")


def labels_of(record: Record, count: int) -> tuple[tuple[str, ...], ...]:
    """What each of a record's questions is about; nothing where it isn't told.

    Raises:
        UserError: no list of lists of texts, or not one for each question.
    """
    given = record.row.get("question_label")
    if given is None:
        return ()
    sound = isinstance(given, list) and all(isinstance(one, list) for one in given)
    if not sound or not all(isinstance(name, str) for one in given for name in one):
        raise record.wrong("'question_label' is no list of lists of texts")
    if len(given) != count:
        raise record.wrong(f"{count} questions and {len(given)} lists of labels; each question has its own")
    return tuple(tuple(one) for one in given)


def part_of(instructions: int, questions: int | None) -> str | None:
    """None where so many instructions and questions are the whole benchmark, else what they are, in words.

    >>> part_of(500, 2250), part_of(7, 30)
    (None, 'in part: 7 of 500 instructions')
    """
    if instructions == INSTRUCTIONS and questions in (QUESTIONS, None):
        return None
    if instructions >= INSTRUCTIONS:
        return f"{FOREIGN}: {instructions} instructions, where there are {INSTRUCTIONS} with {QUESTIONS} questions"
    return f"in part: {instructions} of {INSTRUCTIONS} instructions"


def read_answer(text: str) -> bool | None:
    """An evaluator's answer as the official code reads it; None can't be read.

    >>> [read_answer(text) for text in ("Yes.", "no, because", "Not sure", "The answer is YES", "YES and NO", "Maybe")]
    [True, False, False, True, True, None]
    """
    if text.lower().startswith(("yes", "no")):
        return text.lower().startswith("yes")
    yes, no = "YES" in text, "NO" in text
    return yes if yes != no else None


def dialogue(item: InfobenchItem, response: str, answers: Sequence[str]) -> tuple[Turn, ...]:
    """The chat that asks the next question: all before it, with the evaluator's answers as it wrote them.

    Raises IndexError where there is no next question.
    """
    material = f"Material:\n{item.input}\n\n" if item.input else ""
    first = f"{prompt_text('evaluator')}\n\n{material}Text:\n{response}\n\nQuestion:\n"
    turns = []
    for place in range(len(answers) + 1):
        turns.append(Turn("user", (first if not place else "") + item.questions[place]))
        if place < len(answers):
            turns.append(Turn("assistant", answers[place]))
    return tuple(turns)


def is_over(item: InfobenchItem, answers: Sequence[bool | None]) -> bool:
    """Whether an instruction has no further question: all are answered, or the last answer could not be read."""
    return len(answers) == len(item.questions) or (bool(answers) and answers[-1] is None)


def figures(found: Sequence[Evaluated], seed: int = 0) -> dict[str, Any]:
    """`columns`, and `rows`: row -> `n` questions and, for each column, a figure with its 95 % interval, drawn by
    instruction; and the shares `unreadable` (of the answers) and `unasked` (of the questions).

    Rows: DRFR, the two sets, and what questions are about (one of several labels counts for each). The column `all
    questions` has figures where the number of questions is known.
    """
    rows = {DRFR: _row(found, None, seed)}
    rows |= {name: _row([one for one in found if one.subset == name], None, seed) for name in SUBSETS}
    labels = dict.fromkeys(name for one in found for names in one.labels for name in names)
    rows |= {name: _row(found, name, seed) for name in labels}
    asked = sum(one.asked for one in found)
    known = all(one.questions is not None for one in found)
    questions = sum(one.questions or 0 for one in found) if known else None
    return {
        "columns": [OFFICIAL, ALL],
        "rows": {name: row for name, row in rows.items() if row["n"]},
        "answers": asked,
        "questions": questions,
        "unreadable": sum(answer is None for one in found for answer in one.answers) / asked,
        "unasked": None if questions is None else (questions - asked) / questions,
    }


def _row(found: Sequence[Evaluated], label: str | None, seed: int) -> dict[str, Any]:
    """A row over all questions, or over those with a label."""
    yes, asked, there = [], [], []
    for one in found:
        places = [i for i, names in enumerate(one.labels) if label in names] if label is not None else None
        answers = one.answers if places is None else [one.answers[i] for i in places if i < one.asked]
        yes.append(float(sum(answer is True for answer in answers)))
        asked.append(float(len(answers)))
        there.append(one.questions if places is None else len(places))
    whole = [float(count) for count in there if count is not None]
    groups, n = range(len(found)), int(sum(asked))
    return {
        "n": n,
        OFFICIAL: share_of(groups, yes, asked, n, seed),
        ALL: share_of(groups, yes, whole, int(sum(whole)), seed) if len(whole) == len(found) else None,
    }
