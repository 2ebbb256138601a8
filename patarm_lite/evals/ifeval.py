"""IFEval: 541 prompts with 834 instructions that a program can check, such as "no commas" or "at least 300 words".

Official: google-research `instruction_following_eval` (evaluation_lib.py, instructions_registry.py).

    strict  an instruction is followed where the response is not empty and its checker says so
    loose   ... where that holds for any of eight variants of the response: as it is, without its first line, its last
            one, both; and each of these without its asterisks

A prompt is followed where all its instructions are. Both are told at prompt level (a share of prompts) and at
instruction level (a share of all instructions); instruction level also by family (before the colon) and by type.

The checkers are those of lm-evaluation-harness (extra `bench-model`). What is not left as it is there:

- It downloads NLTK's punkt data when it is imported. Here it doesn't: data that is there is used, else a stand-in
  splits sentences, and whoever shows the figures says so (`Checkers.stand_ins`).
- The official code draws what an instruction leaves open, at random. Here that is an error of the file; but two of the
  834 ask for so many of a sign ("#", "!") where it knows letters only, and draws one. Here the sign is counted.
- langdetect guesses at random where it is not seeded. Here it is. That a language it can't tell counts as followed is
  the official rule and stays.
- JSON that is nested too deeply to be read is no JSON; the official code ends there.
"""

from __future__ import annotations

import contextlib
import io
import logging
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from patarm_lite.errors import UserError, missing_extra, nearest
from patarm_lite.evals.items import FOREIGN, Record
from patarm_lite.evals.resampled import share_of
from patarm_lite.pairs.chats import kind

PROMPTS = 541
TYPES: Mapping[str, int] = {
    "keywords:existence": 39,
    "keywords:frequency": 42,
    "keywords:forbidden_words": 49,
    "keywords:letter_frequency": 33,
    "language:response_language": 31,
    "length_constraints:number_sentences": 52,
    "length_constraints:number_paragraphs": 27,
    "length_constraints:number_words": 52,
    "length_constraints:nth_paragraph_first_word": 12,
    "detectable_content:number_placeholders": 27,
    "detectable_content:postscript": 26,
    "detectable_format:number_bullet_lists": 31,
    "detectable_format:constrained_response": 10,
    "detectable_format:number_highlighted_sections": 48,
    "detectable_format:multiple_sections": 14,
    "detectable_format:json_format": 17,
    "detectable_format:title": 37,
    "combination:two_responses": 24,
    "combination:repeat_prompt": 41,
    "startend:end_checker": 26,
    "startend:quotation": 41,
    "change_case:capital_word_frequency": 25,
    "change_case:english_capital": 25,
    "change_case:english_lowercase": 39,
    "punctuation:no_comma": 66,
}
"""Types of instructions -> how many the benchmark has."""
STRICT, LOOSE, STORED = "strict", "loose", "as stored"
PROMPT_LEVEL, INSTRUCTION_LEVEL = "Prompt level", "Instruction level"
LETTERS = "keywords:letter_frequency"
SENTENCES, CAPITALS = "length_constraints:number_sentences", "change_case:capital_word_frequency"
"""The types whose checkers need NLTK's punkt data."""
DOWNLOAD = "python -m nltk.downloader punkt_tab"
ABBREVIATIONS = (
    "dr mr mrs ms prof rev gen col capt lt sgt sen rep gov hon st jr sr inc ltd co corp dept univ assn bros no vs etc "
    "al fig vol approx ca e.g i.e a.m p.m u.s u.k u.n d.c ph.d jan feb mar apr jun jul aug sep sept oct nov dec"
).split()
STARTERS = "the this that these those there it he she they we you i in on at but and so if when as for".split()
"""Of the stand-in: what a full stop may belong to, and which words begin a sentence even behind one of them."""


@dataclass(frozen=True, slots=True)
class IfevalItem:
    """A prompt with its instructions and what each of them asks for. `place`: where it was read, for errors."""

    id: str
    prompt: str
    instructions: tuple[str, ...]
    arguments: tuple[Mapping[str, Any], ...]
    place: str = ""
    subset: str = ""


@dataclass(frozen=True, slots=True)
class Followed:
    """Which instructions of a prompt were followed: column (`strict`, `loose`) -> one truth for each of them."""

    id: str
    instructions: tuple[str, ...]
    lists: Mapping[str, tuple[bool, ...]]


def read_item(record: Record) -> IfevalItem:
    """A record of the official input file, or of the hub's data set (which fills its arguments up with null).

    Raises:
        UserError: a field of another type, an unknown instruction, or not one set of arguments for each.
    """
    instructions = instructions_of(record)
    given = record.row["kwargs"]
    if not isinstance(given, list) or not all(isinstance(one, dict) for one in given):
        raise record.wrong(f"'kwargs' is {kind(given)}, not a list of objects")
    if len(given) != len(instructions):
        raise record.wrong(f"{len(instructions)} instructions and {len(given)} kwargs; each instruction has its own")
    arguments = tuple({key: value for key, value in one.items() if value is not None} for one in given)
    place = str(record.wrong("")).removesuffix(": ")
    return IfevalItem(record.name("key", "id"), record.text("prompt"), instructions, arguments, place)


def instructions_of(record: Record) -> tuple[str, ...]:
    """The types of a record's instructions.

    Raises:
        UserError: there are none, or one is not known.
    """
    if not record.row["instruction_id_list"]:
        raise record.wrong("'instruction_id_list' is empty")
    found = record.texts("instruction_id_list")
    unknown = next((name for name in found if name not in TYPES), None)
    if unknown is not None:
        raise record.wrong(f"instruction {unknown[:60]!r} is not known.{nearest(unknown, TYPES)}")
    return found


def part_of(instructions: Sequence[Sequence[str]]) -> str | None:
    """None where prompts with these instructions are the whole benchmark, else what they are, in words.

    >>> part_of([["punctuation:no_comma"], ["keywords:existence", "punctuation:no_comma"]])
    'in part: 2 of 541 prompts'
    """
    found = Counter(name for names in instructions for name in names)
    if len(instructions) == PROMPTS and found == TYPES:
        return None
    if len(instructions) >= PROMPTS or any(count > TYPES[name] for name, count in found.items()):
        return f"{FOREIGN}: {len(instructions)} prompts, where there are {PROMPTS}"
    return f"in part: {len(instructions)} of {PROMPTS} prompts"


def variants(response: str) -> list[str]:
    """The eight variants of a response, any of which may follow an instruction loosely (evaluation_lib.py).

    >>> variants("Sure:\\n*a*\\nBye")[1:]
    ['*a*\\nBye', 'Sure:\\n*a*', '*a*', 'Sure:\\na\\nBye', 'a\\nBye', 'Sure:\\na', 'a']
    """
    lines = response.split("\n")
    found = [response, *("\n".join(rest).strip() for rest in (lines[1:], lines[:-1], lines[1:-1]))]
    return [*found, *(one.replace("*", "") for one in found)]


class Checkers:
    """The checkers of all instructions.

    Attributes:
        punkt: whether NLTK's punkt data is there; without it a stand-in splits sentences.
    """

    def __init__(
        self, known: Mapping[str, Any], words: Callable[[str], list[str]], sentences: Any, punkt: bool
    ) -> None:
        self._known, self._words, self._sentences, self.punkt = known, words, sentences, punkt

    @classmethod
    def load(cls) -> Checkers:
        """Without network.

        Raises:
            UserError: lm-evaluation-harness is not installed, or NLTK's data is damaged.
        """
        try:
            import langdetect
            import nltk

            with _no_download(nltk):
                from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT
        except ImportError:
            raise missing_extra("bench-model", "lm-eval[ifeval]") from None
        langdetect.DetectorFactory.seed = 0
        # where langdetect can't tell a language, the library logs the whole response as an error
        logging.getLogger("lm_eval.tasks.ifeval.instructions").setLevel(logging.CRITICAL)

        def words(sentence: str) -> list[str]:
            return list(nltk.word_tokenize(sentence, preserve_line=True))

        sentences, punkt = _sentence_splitter()
        return cls(INSTRUCTION_DICT, words, sentences, punkt)

    def check(self, items: Sequence[IfevalItem]) -> None:
        """Refuse items whose instructions can't be checked, before anything is generated for them.

        Raises:
            UserError: arguments that are missing, too many or of another type; the message says where.
        """
        for item in items:
            for name, arguments in zip(item.instructions, item.arguments, strict=True):
                try:
                    self._checker(name, arguments)("a word")
                except (AttributeError, IndexError, KeyError, TypeError, ValueError, re.error) as error:
                    why = str(error).strip("'\"") or type(error).__name__
                    raise UserError(f"{item.place}: instruction {name!r} can't be checked: {why}") from None

    def followed(self, item: IfevalItem, response: str) -> Followed:
        """Which instructions a response follows, strictly and loosely."""
        tries = [text for text in variants(response) if text.strip()]
        strict, loose = [], []
        for name, arguments in zip(item.instructions, item.arguments, strict=True):
            check = self._checker(name, arguments)
            strict.append(bool(response.strip()) and check(response))
            loose.append(strict[-1] or any(map(check, tries)))
        return Followed(item.id, item.instructions, {STRICT: tuple(strict), LOOSE: tuple(loose)})

    def stand_ins(self, items: Sequence[IfevalItem]) -> dict[str, int]:
        """Types of instructions that the stand-in counts for -> how many of these items have; none where punkt is."""
        found = Counter(name for item in items for name in item.instructions if name in (SENTENCES, CAPITALS))
        return {} if self.punkt else dict(sorted(found.items(), reverse=True))

    def _checker(self, name: str, arguments: Mapping[str, Any]) -> Callable[[str], bool]:
        """What says whether a text follows one instruction.

        Raises ValueError where the library would draw a part of the instruction, and whatever it raises itself.
        """
        checker = self._known[name](name)
        before = random.getstate()
        checker.build_description(**arguments)
        drawn = random.getstate() != before
        random.setstate(before)
        if name == LETTERS and _is_sign(arguments.get("letter")):
            letter, wanted, relation = (arguments[key] for key in ("letter", "let_frequency", "let_relation"))
            return lambda text: _holds(text.count(letter), wanted, relation)
        if drawn:
            missing = [key for key in checker.get_instruction_args_keys() if key not in arguments]
            raise ValueError(f"its kwargs lack {', '.join(missing)}" if missing else "its kwargs are not possible")
        if self.punkt or name not in (SENTENCES, CAPITALS):
            return lambda text: _said(checker, text)
        wanted, relation = checker.get_instruction_args().values()
        count = self._sentence_count if name == SENTENCES else self._capital_count
        return lambda text: _holds(count(text), wanted, relation)

    def _sentence_count(self, text: str) -> int:
        return len(self._sentences.tokenize(text))

    def _capital_count(self, text: str) -> int:
        return sum(word.isupper() for part in self._sentences.tokenize(text) for word in self._words(part))


def _said(checker: Any, text: str) -> bool:
    try:
        return bool(checker.check_following(text))
    except RecursionError:
        return False


def _holds(count: int, wanted: int, relation: str) -> bool:
    return count < wanted if relation == "less than" else count >= wanted


def _is_sign(letter: object) -> bool:
    return isinstance(letter, str) and len(letter) == 1 and not "a" <= letter.lower() <= "z"


@contextlib.contextmanager
def _no_download(nltk: Any) -> Iterator[None]:
    """Keeps the library from fetching NLTK's data while it is imported, and from saying that it did."""
    download = nltk.download
    nltk.download = lambda *_, **__: False
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        nltk.download = download


def _sentence_splitter() -> tuple[Any, bool]:
    """What splits a text into sentences, and whether it is the real one: NLTK's Punkt with its English data, else with
    a short list of abbreviations of ours."""
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer, PunktTokenizer

    try:
        return PunktTokenizer("english"), True
    except LookupError:
        pass
    except (OSError, ValueError) as error:
        raise UserError(f"NLTK's punkt data is damaged ({error}); type: {DOWNLOAD} --force") from None
    known = PunktParameters()
    known.abbrev_types, known.sent_starters = set(ABBREVIATIONS), set(STARTERS)
    return PunktSentenceTokenizer(known), False


def stand_in_note(counts: Mapping[str, int], instructions: int) -> str | None:
    """What a reader must know where a stand-in was used.

    >>> print(stand_in_note({SENTENCES: 52}, 834)[:69])
    52 of 834 instructions (number of sentences) were counted by a stand-
    """
    if not counts:
        return None
    words = {SENTENCES: "number of sentences", CAPITALS: "words in capitals, which seldom depends on it"}
    parts = [f"{count} of {instructions} instructions ({words[name]})" for name, count in counts.items()]
    return (
        f"{' and '.join(parts)} were counted by a stand-in for NLTK's punkt data, which is not here: the figures may "
        f"differ a little from official ones. To count by the real data, type: {DOWNLOAD}"
    )


def figures(followed: Sequence[Followed], seed: int = 0) -> dict[str, Any]:
    """`columns`, and `rows`: row -> `n` and, for each column, a figure with its 95 % interval, drawn by prompt.

    Rows: prompt level, instruction level, families, types.
    """
    columns = list(followed[0].lists)
    rows: dict[str, dict[str, Any]] = {PROMPT_LEVEL: {"n": len(followed)}}
    whole = {column: [float(all(one.lists[column])) for one in followed] for column in columns}
    rows[PROMPT_LEVEL] |= {
        column: share_of(range(len(followed)), values, [1.0] * len(values), len(values), seed)
        for column, values in whole.items()
    }
    there = {name for one in followed for name in one.instructions}
    types = [name for name in TYPES if name in there]
    families = list(dict.fromkeys(name.partition(":")[0] for name in types))
    rows[INSTRUCTION_LEVEL] = _row(followed, columns, types, seed)
    for family in families:
        rows[family] = _row(followed, columns, [name for name in types if name.startswith(f"{family}:")], seed)
    rows |= {name: _row(followed, columns, [name], seed) for name in types}
    return {"columns": columns, "rows": rows}


def _row(followed: Sequence[Followed], columns: Sequence[str], names: Sequence[str], seed: int) -> dict[str, Any]:
    spots = [(n, i) for n, one in enumerate(followed) for i, name in enumerate(one.instructions) if name in names]
    groups, ones = [n for n, _ in spots], [1.0] * len(spots)
    found: dict[str, Any] = {"n": len(spots)}
    for column in columns:
        values = [float(followed[n].lists[column][i]) for n, i in spots]
        found[column] = share_of(groups, values, ones, len(spots), seed)
    return found
