"""A judge on llama.cpp: token ids in, logits or votes out. Numpy and llama-cpp-python, nothing else.

    with LlamaCpp.load(Path("judge.gguf")) as model:
        encoder = model.encoder(protocol)
        votes = model.votes([encoder.prompt_ids(...)], k=8, encoder=encoder, seed=1, max_tokens=512)

The k votes of a prompt share its one prefill: the prompt's sequence is copied whole. Up to `sequences` votes are live
at once, each one token a step; when a prompt's votes are done the next prompt takes their places. Logits are asked for
only where a token is drawn, and drawn tokens come from numpy.

llama.cpp ends the process where a call breaks its rules (too many tokens in a batch, an unknown token id, a part of a
sequence copied), so every number that goes into it is checked here first. One `LlamaCpp` serves one thread at a time.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patarm_lite.errors import UserError
from patarm_lite.gguf_file import read_gguf
from patarm_lite.judge.grammar import Form, Rules
from patarm_lite.judge.loading import LOG, check_file, check_header, library
from patarm_lite.metrics import expected_score
from patarm_lite.prompts import Encoder, Protocol
from patarm_lite.records import Vote
from patarm_lite.verdicts import parse

Ids = Sequence[int]
Floats = NDArray[np.float32]

BATCH = 512
"""Tokens of one call, at most. More is an abort in llama.cpp, so longer prompts go in pieces."""
ROWS = 128
"""Rows of logits of one call, at most: at 152k tokens a row is 0.6 MB."""
MOST_SEQUENCES = 256
"""llama.cpp's own limit."""
WIDEST_GAP = 8
"""llama.cpp computes sequences together only where their numbers follow one another; a gap up to this is filled with
sequences of one token, since a second pass over the weights costs more than these."""
CELLS = 256
"""The cache of a sequence grows in steps of this many tokens."""
DECODINGS = ("free", "constrained")
CACHES = ("f16", "f32")
OPEN, CLOSE = "<score>", "</score>"
ADDED_KINDS = (3, 4)
"""Control and user-defined, in a file's `tokenizer.ggml.token_type`."""


@dataclass(slots=True)
class _Live:
    """One vote being written. `ids` holds what is written, forced tokens included; the first `fed` of them are in the
    cache, at positions from `start` on."""

    prompt: int
    vote: int
    slot: int
    start: int
    ids: list[int]
    fed: int
    uniforms: NDArray[np.float64]
    key: int
    form: Form | None
    digits: list[float] = field(default_factory=list)
    digit_at: int = -9
    ten_or_one: tuple[float, float] | None = None
    verdict: Any = None
    text: str = ""
    probing: bool = False


class LlamaCpp:
    """A loaded GGUF model.

    Attributes:
        path: the file.
        vocab_size: number of tokens.
        added: control and user-defined tokens, spelling -> id.
        context: tokens that a prompt and its judgement may have together.
    """

    def __init__(self, path: Path, model: Any, settings: dict[str, Any]) -> None:
        llama = library()
        self.path = path
        self._llama, self._model, self._settings = llama, model, settings
        self._vocabulary = llama.llama_model_get_vocab(model)
        self.vocab_size = int(llama.llama_vocab_n_tokens(self._vocabulary))
        self.context = min(settings["context"], int(llama.llama_model_n_ctx_train(model)))
        self._pieces: dict[int, bytes] = {}
        self.added = added_tokens(read_gguf(path).metadata)
        self._spelled = re.compile(f"({'|'.join(map(re.escape, sorted(self.added, key=len, reverse=True)))})")
        self._context: Any = None
        self._room = self._streams = 0
        self._batch = _Batch(llama)

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        context: int = 4096,
        sequences: int = 32,
        threads: int | None = None,
        cache: str = "f16",
        flash_attention: bool = True,
        check: bool = True,
        verbose: bool = False,
    ) -> LlamaCpp:
        """Load a GGUF file, without memory mapping: a file that changes later changes nothing.

        Args:
            path: the file.
            context: tokens that a prompt and its judgement may have together, at most; the model's own limit holds
                too. Memory is taken for what a call needs, not for this.
            sequences: votes that are written at once, 1 to 256.
            threads: by default OMP_NUM_THREADS where that is set, else the cores this process may use.
            cache: `f16`, or `f32` for comparisons.
            flash_attention: off for comparisons.
            check: whether the file is first loaded by a child process (see `loading.check_file`).
            verbose: whether llama.cpp's log goes to stderr.

        Raises:
            UserError: a file that can't be loaded, or an argument out of range.
        """
        path = Path(path)
        LOG.verbose = verbose
        if not 1 <= sequences <= MOST_SEQUENCES:
            raise UserError(f"{sequences} sequences are not possible; choose 1 to {MOST_SEQUENCES}")
        if context < 1 or (threads is not None and threads < 1):
            raise UserError(f"context {context} and threads {threads} must be at least 1")
        if cache not in CACHES:
            raise UserError(f"a cache of type {cache!r} is not one of {', '.join(CACHES)}")
        (check_file if check else check_header)(path)
        llama = library()
        LOG.forget()
        options = llama.llama_model_default_params()
        options.load_mode = llama.LLAMA_LOAD_MODE_NONE
        model = llama.llama_model_load_from_file(os.fsencode(path), options)
        if not model:
            raise UserError(f"{path} can't be loaded: {LOG.reason()}; is it whole, and does the memory suffice?")
        settings = {
            "context": context,
            "sequences": sequences,
            "threads": threads or _threads(),
            "cache": llama.GGML_TYPE_F16 if cache == "f16" else llama.GGML_TYPE_F32,
            "flash": llama.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash_attention else llama.LLAMA_FLASH_ATTN_TYPE_DISABLED,
        }
        return cls(path, model, settings)

    def close(self) -> None:
        """Give the memory back. The object can't be used afterwards."""
        self._close_context()
        if self._model:
            self._llama.llama_model_free(self._model)
            self._model = None

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    # tokens

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text. Control tokens in it are read, none is added, and it is taken as it is (no NFC).

        The text is split at control and user-defined tokens here and not by llama.cpp, which takes some ordinary tokens
        for control tokens by their spelling: `</s>` in Qwen's vocabulary.
        """
        self._alive()
        ids: list[int] = []
        for place, part in enumerate(self._spelled.split(text) if self.added else [text]):
            ids += [self.added[part]] if place % 2 else self._plain_ids(part)
        return ids

    def _plain_ids(self, text: str) -> list[int]:
        data = text.encode("utf-8", "replace")
        if not data:
            return []
        ids = (self._llama.llama_token * len(data))()
        count = self._llama.llama_tokenize(self._vocabulary, data, len(data), ids, len(data), False, False)
        if count < 0:
            raise AssertionError(f"{len(data)} bytes became {-count} tokens")
        return list(ids[:count])

    def piece(self, token: int) -> bytes:
        """The bytes a token stands for; a control token's are its spelling."""
        known = self._pieces.get(token)
        return self._piece(token) if known is None else known

    def _piece(self, token: int) -> bytes:
        self._alive()
        self._check_ids([token])
        room = 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            count = self._llama.llama_token_to_piece(self._vocabulary, token, buffer, room, 0, True)
            if count >= 0:
                break
            room = -count
        self._pieces[token] = buffer.raw[:count]
        return self._pieces[token]

    def text(self, ids: Ids) -> str:
        """The text of ids, control tokens spelled out; what is no UTF-8 becomes U+FFFD."""
        return b"".join(map(self.piece, ids)).decode("utf-8", "replace")

    def encoder(self, protocol: Protocol) -> Encoder:
        """The prompt encoder of this vocabulary."""
        return Encoder(self.tokenize, self.added, protocol)

    # logits

    def logits(self, ids: Ids, rows: Iterable[int] | None = None) -> Floats:
        """Logits after the tokens at places `rows` of `ids` (all of them by default), from an empty cache: [R, V].

        Raises:
            UserError: more tokens than the context holds, or a model that answers NaN.
        """
        self._check_ids(ids)
        wanted = range(len(ids)) if rows is None else [int(row) for row in rows]
        if not ids or any(not 0 <= row < len(ids) for row in wanted):
            raise ValueError(f"rows must be places in a list of {len(ids)} ids")
        self._check_length(len(ids), 0, "the text")
        self._make_room(len(ids), 1)
        self._clear()
        at = {row: place for place, row in enumerate(sorted(set(wanted)))}
        found = np.empty((len(at), self.vocab_size), np.float32)
        for start, stop in _chunks(len(ids), at):
            asked = [row for row in range(start, stop) if row in at]
            flags = [row in at for row in range(start, stop)]
            out = self._decode(ids[start:stop], range(start, stop), [0] * (stop - start), flags)
            if asked:
                found[at[asked[0]] : at[asked[-1]] + 1] = out
        _finite(found.max(axis=1, initial=-np.inf), self.path)
        return found[[at[row] for row in wanted]]

    # votes

    def votes(
        self,
        prompts: Sequence[Ids],
        k: int,
        *,
        encoder: Encoder,
        seed: int,
        temperature: float = 1.0,
        decoding: str = "free",
        max_tokens: int,
        expected: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[tuple[Vote, ...]]:
        """k votes for each prompt (token ids), in the order given.

        The chance that draws a token is fixed by (seed, prompt, vote's index, place of the token), by nothing else: two
        quantizations of one judge draw alike, and the first 8 votes of 16 are the 8 votes of 8.

        Args:
            prompts: P lists of ids.
            k: votes a prompt.
            encoder: this vocabulary's, see `encoder`.
            seed: of the draws.
            temperature: 0 takes the likeliest token. The full distribution otherwise (top_p 1, no top_k).
            decoding: `free`, or `constrained` to the protocol's form: readable by construction.
            max_tokens: of a judgement, its end token included.
            expected: whether the expected score is measured too (at temperature 1, whatever the grammar forbids).
            progress: called with (prompts done, P).

        Raises:
            UserError: a prompt that doesn't fit the context, too few tokens for any judgement in constrained decoding,
                or a model that answers NaN.
        """
        if decoding not in DECODINGS:
            raise UserError(f"decoding {decoding!r} is not one of {', '.join(DECODINGS)}")
        if k < 1 or max_tokens < 1 or temperature < 0:
            raise UserError(
                f"k {k} and max_tokens {max_tokens} must be at least 1, temperature {temperature} at least 0"
            )
        for number, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"prompt {number} has no tokens")
            self._check_ids(prompt)
            self._check_length(len(prompt), max_tokens, f"prompt {number + 1} of {len(prompts)}")
        if not prompts:
            return []
        rules = None
        if decoding == "constrained":
            rules = self._rules_of(encoder)
            rules.check_budget(max_tokens)
        run = _Run(self, prompts, k, encoder, seed, temperature, rules, max_tokens, expected, progress)
        self._make_room(max(map(len, prompts)) + max_tokens + 1, min(self._settings["sequences"], k * len(prompts)))
        self._clear()
        return run.votes()

    @cached_property
    def _rules(self) -> dict[tuple[bool, int], Rules]:
        return {}

    def _rules_of(self, encoder: Encoder) -> Rules:
        key = (encoder.protocol.thinking, encoder.end_id)
        if key not in self._rules:
            self._rules[key] = Rules(self.tokenize, self.piece, set(self.added.values()), encoder.end_id, key[0])
        return self._rules[key]

    # the context: every call that could end the process goes through these

    def _alive(self) -> None:
        if not self._model:
            raise ValueError(f"{self.path} was closed")

    def _check_ids(self, ids: Ids) -> None:
        self._alive()
        if len(ids) and (min(ids) < 0 or max(ids) >= self.vocab_size):
            raise ValueError(f"a token id is not one of the {self.vocab_size} of {self.path}")

    def _check_length(self, tokens: int, more: int, what: str) -> None:
        if tokens + more > self.context:
            rest = f" and up to {more} for the judgement" if more else ""
            raise UserError(
                f"{what} has {tokens} tokens{rest}, and the context holds {self.context};"
                " shorten it, or load the judge with a larger context"
            )

    def _make_room(self, tokens: int, sequences: int) -> None:
        """A context with at least that many sequences of at least that many tokens."""
        tokens = -(-tokens // CELLS) * CELLS
        if self._context and tokens <= self._room and sequences <= self._streams:
            return
        tokens, sequences = max(tokens, self._room), max(sequences, self._streams)
        self._close_context()
        llama = self._llama
        settings = llama.llama_context_default_params()
        settings.n_ctx = tokens * sequences
        settings.n_batch = settings.n_ubatch = BATCH
        settings.n_seq_max = sequences
        settings.n_outputs_max = max(ROWS, sequences)
        settings.n_threads = settings.n_threads_batch = self._settings["threads"]
        settings.flash_attn_type = self._settings["flash"]
        settings.type_k = settings.type_v = self._settings["cache"]
        settings.kv_unified = False
        settings.no_perf = True
        LOG.forget()
        self._context = llama.llama_init_from_model(self._model, settings)
        if not self._context:
            raise UserError(
                f"llama.cpp made no context of {sequences} sequences with {tokens} tokens each: {LOG.reason()};"
                " load the judge with fewer sequences"
            )
        if llama.llama_n_ctx_seq(self._context) < tokens or llama.llama_n_batch(self._context) < min(BATCH, tokens):
            raise AssertionError("llama.cpp made a smaller context than asked for")
        self._room, self._streams = tokens, sequences
        self._memory = llama.llama_get_memory(self._context)
        self._largest = int(llama.llama_n_batch(self._context))

    def _close_context(self) -> None:
        if self._context:
            self._llama.llama_free(self._context)
        self._context = None
        self._room = self._streams = 0

    def _clear(self) -> None:
        self._llama.llama_memory_clear(self._memory, False)

    def _decode(self, tokens: Ids, places: Ids, slots: Ids, flags: Sequence[bool]) -> Floats:
        """One call of llama.cpp: the flagged rows' logits, in order. The array is llama.cpp's until the next call."""
        count, rows = len(tokens), sum(flags)
        fits = 0 < count <= self._largest and rows <= max(ROWS, self._streams)
        if not fits or max(places) >= self._room or min(slots) < 0 or max(slots) >= self._streams:
            raise AssertionError(f"a batch of {count} tokens and {rows} rows does not fit this context")
        LOG.forget()
        status = self._llama.llama_decode(self._context, self._batch.of(tokens, places, slots, flags))
        if status != 0:
            raise UserError(f"llama.cpp could not go on with {self.path} (status {status}): {LOG.reason()}")
        if not rows:
            return np.empty((0, self.vocab_size), np.float32)
        pointer = self._llama.llama_get_logits(self._context)
        if not pointer:
            raise AssertionError("llama.cpp gave no logits")
        return np.ctypeslib.as_array(pointer, (rows, self.vocab_size))

    def _prefill(self, ids: Ids, slots: Sequence[int]) -> Floats:
        """A prompt into the first slot, and from there into the others whole: the last token's logits [1, V]."""
        self._empty(slots)
        out = np.empty((0, self.vocab_size), np.float32)
        for start in range(0, len(ids), self._largest):
            stop = min(start + self._largest, len(ids))
            flags = [row == len(ids) - 1 for row in range(start, stop)]
            out = self._decode(ids[start:stop], range(start, stop), [slots[0]] * (stop - start), flags)
        for slot in slots[1:]:
            self._llama.llama_memory_seq_cp(self._memory, slots[0], slot, -1, -1)
        return out

    def _empty(self, slots: Iterable[int]) -> None:
        for slot in slots:
            self._llama.llama_memory_seq_rm(self._memory, slot, -1, -1)

    def _cut(self, slot: int, place: int) -> None:
        """Forget what a sequence holds from a place on."""
        if not self._llama.llama_memory_seq_rm(self._memory, slot, place, -1):
            raise AssertionError("llama.cpp could not shorten a sequence")


class _Batch:
    """The arrays of a `llama_batch`, made once."""

    def __init__(self, llama: Any) -> None:
        self.token, self.place, self.slot = (np.zeros(BATCH, np.int32) for _ in range(3))
        self.flag = np.zeros(BATCH, np.int8)
        self._one = np.ones(BATCH, np.int32)
        first, size = self.slot.ctypes.data, self.slot.itemsize
        pointer = ctypes.POINTER(ctypes.c_int32)
        self._slots = (pointer * BATCH)(*(ctypes.cast(first + size * place, pointer) for place in range(BATCH)))
        self._struct = llama.llama_batch()
        self._struct.token = self.token.ctypes.data_as(pointer)
        self._struct.pos = self.place.ctypes.data_as(pointer)
        self._struct.n_seq_id = self._one.ctypes.data_as(pointer)
        self._struct.seq_id = self._slots
        self._struct.logits = self.flag.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))

    def of(self, tokens: Ids, places: Ids, slots: Ids, flags: Sequence[bool]) -> Any:
        count = len(tokens)
        self.token[:count], self.place[:count], self.slot[:count] = tokens, places, slots
        self.flag[:count] = flags
        self._struct.n_tokens = count
        return self._struct


class _Run:
    """One call of `LlamaCpp.votes`: which vote stands in which sequence, and what it has written."""

    def __init__(
        self,
        model: LlamaCpp,
        prompts: Sequence[Ids],
        k: int,
        encoder: Encoder,
        seed: int,
        temperature: float,
        rules: Rules | None,
        max_tokens: int,
        expected: bool,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.model, self.prompts, self.k, self.encoder = model, prompts, k, encoder
        self.seed, self.temperature, self.rules = seed, temperature, rules
        self.max_tokens, self.expected, self.progress = max_tokens, expected, progress
        self.found: list[list[Vote | None]] = [[None] * k for _ in prompts]
        self.open = model.tokenize(OPEN)
        self.close = model.tokenize(CLOSE)[0]
        self.digits = [_only(model.tokenize(str(digit)), digit) for digit in range(10)] if expected else []
        self.live: list[_Live] = []
        self.free: list[int] = []
        self.done = 0

    def votes(self) -> list[tuple[Vote, ...]]:
        most = min(self.model._settings["sequences"], self.model._streams)
        self.free = list(range(most))
        waiting = deque(
            (prompt, list(range(first, min(first + most, self.k))))
            for prompt in range(len(self.prompts))
            for first in range(0, self.k, most)
        )
        while waiting or self.live:
            while waiting and len(self.free) >= len(waiting[0][1]):
                self._begin(*waiting.popleft())
            if self.live:
                self._step()
        return [tuple(vote for vote in votes if vote is not None) for votes in self.found]

    def _begin(self, prompt: int, votes: list[int]) -> None:
        """Read a prompt and draw the first token of its votes."""
        ids = list(self.prompts[prompt])
        opening = Form(self.rules, self.max_tokens).begin() if self.rules else []
        self.free.sort()
        slots, self.free = self.free[: len(votes)], self.free[len(votes) :]
        last = self.model._prefill([*ids, *opening], slots)
        digest = hashlib.blake2b(np.asarray(ids, np.int32).tobytes(), digest_size=16)
        lives = []
        for vote, slot in zip(votes, slots, strict=True):
            key = _key(self.seed, digest.digest(), vote)
            form = Form(self.rules, self.max_tokens) if self.rules else None
            if form is not None:
                form.begin()
            lives.append(
                _Live(
                    prompt,
                    vote,
                    slot,
                    len(ids),
                    list(opening),
                    len(opening),
                    _uniforms(key, self.max_tokens),
                    key,
                    form,
                )
            )
        self.live = sorted(self.live + lives, key=lambda live: live.slot)
        self._answer(lives, np.repeat(last, len(lives), axis=0))

    def _step(self) -> None:
        """Feed every live vote its next token, and draw the next where there is none."""
        tokens: list[int] = []
        places: list[int] = []
        slots: list[int] = []
        flags: list[bool] = []
        asking: list[_Live] = []
        for live in self.live:
            gap = range(slots[-1] + 1, live.slot) if slots else range(0)
            if 0 < len(gap) <= WIDEST_GAP:
                self.model._empty(gap)
                tokens += [0] * len(gap)
                places += [0] * len(gap)
                slots += gap
                flags += [False] * len(gap)
            asks = live.probing or live.fed == len(live.ids) - 1
            tokens.append(self.digits[1] if live.probing else live.ids[live.fed])
            places.append(live.start + live.fed)
            slots.append(live.slot)
            flags.append(asks)
            live.fed += 1
            if asks:
                asking.append(live)
        out = self.model._decode(tokens, places, slots, flags)
        if asking:
            self._answer(asking, out)

    def _answer(self, lives: Sequence[_Live], logits: Floats) -> None:
        """Draw a token for each vote from its row of logits [L, V], and see what is finished."""
        highest = logits.max(axis=1)
        _finite(highest, self.model.path)
        chances = np.array([live.uniforms[min(len(live.ids), self.max_tokens - 1)] for live in lives])
        drawn = draw(logits, highest, chances, self.temperature)
        for live, token, row in zip(lives, drawn.tolist(), logits, strict=True):
            if self.expected:
                self._measure(live, row)
            if live.probing:
                self._end(live)
            elif live.form is None:
                live.ids.append(token)
                if token == self.encoder.end_id or len(live.ids) == self.max_tokens:
                    self._finish(live)
            else:
                if not live.form.accepts(token):
                    token = race(row, self.temperature, live.key, len(live.ids), live.form)
                live.ids += live.form.take(token)
                if live.form.done:
                    self._finish(live)

    def _measure(self, live: _Live, row: Floats) -> None:
        """Keep the digits' probabilities after `<score>`, and after that the two ways on from a "1"."""
        if live.probing or (live.digit_at == len(live.ids) - 1 and live.ids[-1] == self.digits[1]):
            ten, one = softmax(row)[[self.digits[0], self.close]].tolist()
            live.ten_or_one = (ten, one)
        elif live.ids[-len(self.open) :] == self.open:
            live.digits = softmax(row)[self.digits[1:]].tolist()
            live.digit_at, live.ten_or_one = len(live.ids), None

    def _finish(self, live: _Live) -> None:
        """Read what a vote has written. Where its expected score lacks the way on from "1", that is asked for."""
        end = self.encoder.end_id
        ended = live.ids[-1] == end
        live.text = self.model.text(live.ids[:-1] if ended else live.ids)
        live.verdict = parse(live.text, ended, self.encoder.protocol.thinking)
        if live.verdict.score is None or live.digit_at < 0:
            live.digits = []
        if live.digits and live.ten_or_one is None:
            if live.fed > live.digit_at:
                self.model._cut(live.slot, live.start + live.digit_at)
            live.fed, live.probing = live.digit_at, True
        else:
            self._end(live)

    def _end(self, live: _Live) -> None:
        score: float | None = None
        mass: float | None = None
        if live.digits and live.ten_or_one is not None:
            score, mass = expected_score(live.digits, *live.ten_or_one)
        self.found[live.prompt][live.vote] = Vote(live.verdict, live.text, score, mass, len(live.ids))
        self.live.remove(live)
        self.free.append(live.slot)
        if None not in self.found[live.prompt]:
            self.done += 1
            if self.progress is not None:
                self.progress(self.done, len(self.prompts))


def draw(logits: Floats, highest: Floats, chances: NDArray[np.float64], temperature: float) -> NDArray[np.int64]:
    """A token for each row: the inverse of the cumulated distribution at the row's chance in [0, 1).

    Args:
        logits: [R, V].
        highest: each row's highest logit [R].
        chances: [R].
        temperature: 0 takes the likeliest token, the lowest id where two are equal.
    """
    if temperature == 0:
        return logits.argmax(axis=1)
    weights = logits - highest[:, None]
    if temperature != 1:
        weights /= temperature
    np.exp(weights, out=weights)
    cumulated = np.cumsum(weights, axis=1, dtype=np.float64)
    wanted = np.minimum(chances * cumulated[:, -1], np.nextafter(cumulated[:, -1], 0))  # a product may round up
    return np.array([row.searchsorted(at, side="right") for row, at in zip(cumulated, wanted, strict=True)])


def race(row: Floats, temperature: float, key: int, step: int, form: Form) -> int:
    """A token the form accepts, from the row's distribution restricted to such tokens.

    Every token runs for an exponential time at the rate of its probability, and the first accepted one wins: that is
    a draw from the restricted distribution, and tokens need to be asked only in the order in which they arrive. The
    chances are another stream than `draw`'s, so rejecting its token and racing is exact.
    """
    few = form.few()
    places = np.arange(len(row)) if few is None else np.array(sorted(few))
    if temperature == 0:
        arrival = -row[places].astype(np.float64)
    else:
        runs = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, step + 1, 1])).exponential(size=len(row))
        arrival = np.log(runs[places]) - row[places].astype(np.float64) / temperature
    if few is not None:
        return int(places[arrival.argmin()])
    first = 64
    tried = 0
    while tried < len(row):
        count = min(first, len(row))
        ahead = np.argpartition(arrival, count - 1)[:count] if count < len(row) else np.arange(len(row))
        for token in ahead[np.lexsort((ahead, arrival[ahead]))][tried:].tolist():
            if form.accepts(token):
                return int(token)
        tried, first = count, first * 8
    raise AssertionError("no token of the vocabulary goes on here")


def added_tokens(metadata: Mapping[str, Any]) -> dict[str, int]:
    """Control and user-defined tokens as the file types them, spelling -> id."""
    tokens, kinds = metadata.get("tokenizer.ggml.tokens", ()), metadata.get("tokenizer.ggml.token_type", ())
    return {token: index for index, (token, kind) in enumerate(zip(tokens, kinds, strict=False)) if kind in ADDED_KINDS}


def softmax(row: Floats) -> NDArray[np.float64]:
    """Probabilities of one row of logits."""
    weights = np.exp(row.astype(np.float64) - float(row.max()))
    return np.asarray(weights / weights.sum(), dtype=np.float64)


def _uniforms(key: int, count: int) -> NDArray[np.float64]:
    """Chances in [0, 1) for the places of one vote; more of them never change the first ones."""
    raw = np.random.Philox(key=key).random_raw(count)
    return np.asarray((raw >> np.uint64(11)) * 2.0**-53, dtype=np.float64)


def _key(seed: int, prompt: bytes, vote: int) -> int:
    told = hashlib.blake2b(f"{seed}:{vote}:".encode() + prompt, digest_size=16)
    return int.from_bytes(told.digest(), "little")


def _finite(highest: Floats, path: Path) -> None:
    """A NaN anywhere in a row is its maximum too."""
    if not np.isfinite(highest).all():
        raise UserError(f"{path} answers with logits that are not numbers; its weights are damaged: make the file anew")


def _only(ids: Ids, digit: int) -> int:
    if len(ids) != 1:
        raise UserError(f"the vocabulary writes the digit {digit} as {len(ids)} tokens; only single ones work here")
    return ids[0]


def _chunks(length: int, wanted: dict[int, int]) -> Iterable[tuple[int, int]]:
    """Spans of at most BATCH tokens and ROWS wanted rows."""
    start = rows = 0
    for place in range(length):
        if place - start == BATCH or (rows == ROWS and place in wanted):
            yield start, place
            start, rows = place, 0
        rows += place in wanted
    yield start, length


def _threads() -> int:
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdigit() and int(given) > 0:
        return int(given)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
