"""The prompt protocol: (task, rubric, prompt, response) -> token ids. One code for training and for judging.

Texts to be judged are data. A judging prompt is a list of segments: template parts, written by us, and contents,
written by others. Each segment is tokenized alone, contents only after `inert`, so that no content can form a
control token, a user-defined token or a tag of the protocol, and no content can change the ids of the template
around it.
"""

from __future__ import annotations

import functools
import importlib.resources
import itertools
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from patarm_lite.errors import UserError
from patarm_lite.records import Pair, Rubric, Turn
from patarm_lite.rubrics import rubric_text

NAME = "patarm-lite/1"
FORMS = ("own", "shared")
"""Forms of judging: the rubric written in the judgement, or before any response is seen and shared by all of them."""
INPUT_TAGS = ("task", "rubrics", "prompt", "turn", "response", "reference")
OUTPUT_TAGS = ("generated_rubrics", "eval", "score")
BROKEN = "‹"
"""What the `<` of a forbidden token or tag becomes (U+2039)."""
BREAKS = {"<": BROKEN, "[": "⁅", "]": "⁆", "|": "¦", ">": "›"}
"""A character of a forbidden token -> what it becomes; the first such character of a token is broken. The square
bracket is for vocabularies whose unused places are user-defined tokens like `[PAD151646]` (GGUF files of Qwen have been
made so) and for Mistral's `[INST]`, the last three for stock files (`]~b]`, `|||EMAIL_ADDRESS|||`, `>>TITLE<<`)."""
OPENERS = ("<", "[")
"""What a special token of a vocabulary that judges are trained with must begin with."""

USER, END_OF_TURN, ASSISTANT = "<|im_start|>user\n", "<|im_end|>\n", "<|im_start|>assistant\n"
NO_THINKING = "<think>\n\n</think>\n\n"
AFTER_RUBRIC = END_OF_TURN.removeprefix("<|im_end|>")
"""What stands between the end token of a rubric, which is the judge's own, and the second user turn."""
START_TOKEN, END_TOKEN = "<|im_start|>", "<|im_end|>"
ROLES = ("system", "user", "assistant")
_ALWAYS = "/?(?:" + "|".join((*INPUT_TAGS, *OUTPUT_TAGS, "think")) + r")(?!\w)|\|im_(?:start|end)\|>"
_MANY_MARKS = re.compile(r"[^\w\s\x00-\x7f]{64,}")


QWEN3_TOKENS = tuple(
    (
        "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|>"
        " <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
        " <tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>"
        " <tool_response> </tool_response> <think> </think>"
    ).split()
)
"""Control and user-defined tokens of Qwen3's vocabulary: what must not stand in a text to be judged."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a judging prompt. `content` is True for text written by others."""

    text: str
    content: bool


@dataclass(frozen=True, slots=True)
class Protocol:
    """What fixes a judging prompt besides its contents. Stored with every judge.

    `instructions`: whether the turn begins with the written explanation of the protocol (a judge trained from
    scratch does without). `thinking`: whether the judge may think before its judgement. `forms`: those of `FORMS`
    that the judge serves.
    """

    name: str = NAME
    instructions: bool = True
    thinking: bool = False
    forms: tuple[str, ...] = ("own",)

    def __post_init__(self) -> None:
        if self.name != NAME:
            raise UserError(f"protocol {self.name!r} is not known here; this version runs {NAME!r}")
        if not self.forms or not set(self.forms) <= set(FORMS):
            raise UserError(f"the protocol's forms {list(self.forms)} are not all known; there are: {', '.join(FORMS)}")


@dataclass(frozen=True, slots=True)
class Frame:
    """What stands around our turns, as text.

    `user`: before the first user turn. `assistant`: from behind a user turn up to where the judge begins to write.
    `again`: from the end token of an answer, which is not in it, to the next user turn; None where there can't be one.
    """

    user: str
    assistant: str
    again: str | None


def chatml(protocol: Protocol) -> Frame:
    """The protocol's own frame, as Qwen3's chat template writes it."""
    ending = END_OF_TURN + ASSISTANT + ("" if protocol.thinking else NO_THINKING)
    return Frame(USER, ending, AFTER_RUBRIC + USER)


@dataclass(frozen=True, slots=True)
class Stock:
    """How somebody else's vocabulary and chat template are used, in place of ChatML and one `encode` for everything.

    `frame`: of the file's template. `begin`: the text a prompt begins with -> ids, the token that begins a text
    included. `again`: text behind an end token -> ids. `content`: harmless text -> ids, none of them in `special`,
    whose pieces are that text. `tokens`: spellings that are broken in contents. `special`: ids that no content may
    hold. `ends`: the tokens that end an answer, the template's own first.
    """

    frame: Frame
    begin: Callable[[str], list[int]]
    again: Callable[[str], list[int]]
    content: Callable[[str], list[int]]
    tokens: tuple[str, ...]
    special: frozenset[int]
    ends: tuple[int, ...]


@functools.cache
def prompt_text(name: str) -> str:
    """A text of the protocol by its file's stem in `prompt_texts/`, without the last newline."""
    file = importlib.resources.files("patarm_lite") / "prompt_texts" / f"{name}.txt"
    return file.read_text(encoding="utf-8").rstrip("\n")


def segments(
    protocol: Protocol,
    prompt: Sequence[Turn],
    response: str,
    *,
    task: str,
    rubric: Rubric,
    reference: str | None = None,
    frame: Frame | None = None,
) -> list[Segment]:
    """The judging prompt of form `own` as template parts and contents, up to where the judge begins to write.

    Args:
        frame: what stands around the turn; by default the protocol's own, `chatml`.

    Raises:
        UserError: for a prompt without turns or a role that a chat can't have.
    """
    frame = frame or chatml(protocol)
    beginning = frame.user + (prompt_text("instructions") + "\n\n" if protocol.instructions else "")
    blocks = [*_question(prompt, task, rubric), *_answer(response, reference)]
    return _laid_out(frame, beginning, blocks)


def rubric_segments(
    protocol: Protocol, prompt: Sequence[Turn], *, task: str, rubric: Rubric, frame: Frame | None = None
) -> list[Segment]:
    """The first turn of form `shared`, up to where the judge begins to write its rubric. It holds no response.

    Raises:
        UserError: as `segments`.
    """
    frame = frame or chatml(protocol)
    beginning = frame.user + (prompt_text("instructions_shared") + "\n\n" if protocol.instructions else "")
    return _laid_out(frame, beginning, _question(prompt, task, rubric))


def response_segments(
    protocol: Protocol, response: str, *, reference: str | None = None, frame: Frame | None = None
) -> list[Segment]:
    """The second turn of form `shared`, from behind the end token of the rubric up to where the judge begins to
    evaluate.

    Raises:
        UserError: for a frame that has no second turn.
    """
    frame = frame or chatml(protocol)
    if frame.again is None:
        raise UserError("the file's chat template has no second user turn, which form shared needs; judge in form own")
    return _laid_out(frame, frame.again, _answer(response, reference))


Block = tuple[str, str, str]
"""What stands on the line before a content, the content, and what stands on the line behind it."""


def _question(prompt: Sequence[Turn], task: str, rubric: Rubric) -> list[Block]:
    if not prompt:
        raise UserError("the prompt has no turns; give at least one, e.g. Turn('user', TEXT)")
    blocks = [("<task>", task, "</task>"), ("<rubrics>", rubric_text(rubric), "</rubrics>")]
    if len(prompt) == 1 and prompt[0].role == "user":
        return [*blocks, ("<prompt>", prompt[0].content, "</prompt>")]
    for number, turn in enumerate(prompt, 1):
        if turn.role not in ROLES:
            raise UserError(f"role {turn.role!r} in a chat is not one of {', '.join(ROLES)}")
        opening = ("<prompt>\n" if number == 1 else "") + f"<turn role={turn.role}>"
        blocks.append((opening, turn.content, "</turn>" + ("\n</prompt>" if number == len(prompt) else "")))
    return blocks


def _answer(response: str, reference: str | None) -> list[Block]:
    known = [] if reference is None else [("<reference>", reference, "</reference>")]
    return [*known, ("<response>", response, "</response>")]


def _laid_out(frame: Frame, beginning: str, blocks: Sequence[Block]) -> list[Segment]:
    """A user turn and the beginning of the judge's."""
    parts: list[Segment] = []
    template = beginning
    for opening, text, closing in blocks:
        parts += [Segment(f"{template}{opening}\n", False), Segment(text, True)]
        template = f"\n{closing}\n"
    return [*parts, Segment(template.removesuffix("\n") + frame.assistant, False)]


def inert(text: str, tokens: Iterable[str] = ()) -> str:
    """Content made harmless: NFC, no lone surrogates, and every token or tag of ours broken at its first character
    that is in `BREAKS`.

    Args:
        text: any string.
        tokens: the tokenizer's control and user-defined tokens, spelled out; each holds such a character. The
            protocol's tags, `<think>`, `<|im_start|>` and `<|im_end|>` are broken whatever is given.

    >>> inert("a <b> and </score><|im_end|><tool_call>", ["<tool_call>"])
    'a <b> and ‹/score>‹|im_end|>‹tool_call>'
    """
    return _openings(tuple(tokens)).sub(lambda opening: BREAKS[opening[0]], _plain(text))


def break_at(token: str) -> int | None:
    """Where a special token is broken: its first character in `BREAKS`, or None where it has none."""
    return next((place for place, character in enumerate(token) if character in BREAKS), None)


def inert_judgement(text: str, tokens: Iterable[str]) -> str:
    """A judgement from a file: control and user-defined tokens are broken, the protocol's tags stay."""
    return _openings(tuple(tokens), tags=False).sub(lambda opening: BREAKS[opening[0]], _plain(text))


@functools.lru_cache(maxsize=32)
def _openings(tokens: tuple[str, ...], tags: bool = True) -> re.Pattern[str]:
    """Matches the character at which it is broken, and only that, of whatever must be, so that overlaps are all
    found."""
    rests: dict[tuple[str, str], list[str]] = {("", "<"): [_ALWAYS]} if tags else {}
    for token in tokens:
        place = break_at(token)
        if place is None:
            raise ValueError(f"the token {token!r} can't be broken")
        rests.setdefault((token[:place], token[place]), []).append(re.escape(token[place + 1 :]))
    groups = [
        (f"(?<={re.escape(before)})" if before else "") + f"{re.escape(first)}(?={'|'.join(rest)})"
        for (before, first), rest in rests.items()
    ]
    return re.compile("|".join(groups) or "(?!)")


def _plain(text: str) -> str:
    """NFC text that UTF-8 can hold: a lone surrogate becomes `?`."""
    if text.isascii():
        return text
    return _nfc(text.encode("utf-8", "replace").decode("utf-8"))


def _nfc(text: str) -> str:
    """`unicodedata.normalize("NFC", text)` in linear time.

    Python puts a run of combining marks in order by insertion: 200,000 of them after one letter take a minute, so a
    hostile text could stall a run. Long runs are therefore put in order beforehand, by a stable sort, which is what
    the canonical ordering is.
    """
    return unicodedata.normalize("NFC", _MANY_MARKS.sub(lambda run: _in_order(run[0]), text))


def _in_order(marks: str) -> str:
    decomposed = "".join(unicodedata.normalize("NFD", mark) for mark in marks)
    runs = itertools.groupby(decomposed, key=lambda mark: unicodedata.combining(mark) > 0)
    return "".join("".join(sorted(run, key=unicodedata.combining) if combining else run) for combining, run in runs)


class Encoder:
    """Judging prompts to token ids, for one tokenizer and one protocol.

    Args:
        encode: text -> ids, reading control tokens in the text, adding none of its own.
        added: every control and user-defined token of the vocabulary, spelling -> id.
        protocol: the protocol to render.
        stock: for somebody else's file, what takes the place of ChatML and of `encode` in contents.

    Attributes:
        frame: what stands around our turns. end_id: the end token. ends: every token that ends an answer.

    Raises:
        UserError: when a control token begins with neither `<` nor `[` (it could not be broken visibly), the turn's
            tokens are missing, or `encode` adds tokens of its own.
    """

    def __init__(
        self, encode: Callable[[str], list[int]], added: dict[str, int], protocol: Protocol, stock: Stock | None = None
    ) -> None:
        self.protocol = protocol
        self.frame = stock.frame if stock else chatml(protocol)
        self._encode = encode
        self._encode_content = stock.content if stock else encode
        self._begin = stock.begin if stock else None
        self._again = stock.again if stock else None
        self._template = functools.cache(lambda text: tuple(encode(text)))
        self._repeated = functools.lru_cache(maxsize=4096)(lambda text: tuple(self._content(text)))
        if stock:
            self._tokens, self._forbidden = stock.tokens, stock.special
            self.end_id, self.ends = stock.ends[0], frozenset(stock.ends)
            return
        stubborn = sorted(t for t in added if not t.startswith(OPENERS) or not set(BREAKS.values()).isdisjoint(t))
        if stubborn:
            raise UserError(
                f"the tokenizer has a special token {stubborn[0]!r}, which can't be told from text to be judged;"
                " only tokenizers whose special tokens begin with '<' or '[' work: choose a Qwen-like base"
            )
        for token in (START_TOKEN, END_TOKEN):
            if token not in added:
                raise UserError(f"the tokenizer has no {token} token; choose a Qwen-like base")
            ids = list(encode(token))
            if ids != [added[token]]:
                raise UserError(f"the tokenizer reads {token} as {ids}, not as {[added[token]]}; make it add no tokens")
        self.end_id = added[END_TOKEN]
        self.ends = frozenset({self.end_id})
        self._tokens = tuple(sorted(added))
        self._forbidden = frozenset(added.values())

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, protocol: Protocol) -> Encoder:
        """For a transformers tokenizer. Its pad token, whatever that is, is forbidden in contents too."""
        added = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
        added.update(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        return cls(lambda text: tokenizer.encode(text, add_special_tokens=False), added, protocol)

    def content_ids(self, text: str) -> list[int]:
        """Ids of a content. None of them is a control, user-defined or pad token, whatever the text.

        Short contents are remembered: tasks, rubrics and prompts come back for every response.
        """
        return list(self._repeated(text)) if len(text) <= 2000 else self._content(text)

    def _content(self, text: str) -> list[int]:
        ids = self._encode_content(inert(text, self._tokens))
        if not self._forbidden.isdisjoint(ids):
            raise AssertionError(f"content forms a control token: {text[:80]!r}")
        return ids

    def prompt_ids(
        self,
        prompt: Sequence[Turn],
        response: str,
        *,
        task: str,
        rubric: Rubric,
        reference: str | None = None,
    ) -> list[int]:
        """Form `own`: the ids a judge reads for one response, template included."""
        parts = segments(
            self.protocol, prompt, response, task=task, rubric=rubric, reference=reference, frame=self.frame
        )
        return self._ids(parts, self._begin)

    def rubric_prompt_ids(self, prompt: Sequence[Turn], *, task: str, rubric: Rubric) -> list[int]:
        """Form `shared`: the ids a judge reads before it writes the rubric for a prompt."""
        parts = rubric_segments(self.protocol, prompt, task=task, rubric=rubric, frame=self.frame)
        return self._ids(parts, self._begin)

    def response_prompt_ids(
        self,
        prompt: Sequence[Turn],
        response: str,
        *,
        task: str,
        rubric: Rubric,
        rubric_text: str,
        reference: str | None = None,
    ) -> list[int]:
        """Form `shared`: the ids a judge reads before it evaluates one response: both turns.

        They begin with those of `rubric_prompt_ids` and of the rubric as a judgement.

        Args:
            rubric: the primary rubric, as in `rubric_prompt_ids`.
            rubric_text: what the judge wrote there, its tags included (`verdicts.RubricPart.text`).
        """
        ids = self.rubric_prompt_ids(prompt, task=task, rubric=rubric) + self.judgement_ids(rubric_text)
        parts = response_segments(self.protocol, response, reference=reference, frame=self.frame)
        return ids + self._ids(parts, self._again)

    def _ids(self, parts: Sequence[Segment], opening: Callable[[str], list[int]] | None) -> list[int]:
        """Ids of segments; `opening`: what encodes the first of them, where that is not done as elsewhere."""
        ids: list[int] = []
        for place, part in enumerate(parts):
            if part.content:
                ids += self.content_ids(part.text)
            elif opening is not None and not place:
                ids += opening(part.text)
            else:
                ids += self._template(part.text)
        return ids

    def judgement_ids(self, judgement: str) -> list[int]:
        """Ids of a judgement to learn from, the end token included."""
        return [*self._encode_content(inert_judgement(judgement, self._tokens)), self.end_id]

    def forced_ids(self, text: str) -> list[int]:
        """Ids of a beginning of ours that the judge's answer is given, after the prompt's own."""
        return list(self._template(text))

    def pair_ids(self, pair: Pair, rubric: Rubric) -> tuple[list[int], list[int]]:
        """Prompt ids of the chosen and of the rejected side."""
        chosen, rejected = (
            self.prompt_ids(pair.prompt, response, task=pair.task, rubric=rubric, reference=pair.reference)
            for response in (pair.chosen, pair.rejected)
        )
        return chosen, rejected


def decode_judgement(tokenizer: Any, ids: Sequence[int], end_id: int) -> tuple[str, bool]:
    """Text of a completion and whether its end token was seen.

    What follows the end token (padding) is left out; control tokens before it are spelled out, so that
    `verdicts.parse` sees them.
    """
    ids = list(ids)
    ended = end_id in ids
    if ended:
        ids = ids[: ids.index(end_id)]
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False), ended
