"""A judge on llama.cpp: token ids in, logits or votes out. Numpy and llama-cpp-python, nothing else.

    with LlamaCpp.load(Path("judge.gguf")) as model:
        encoder = model.encoder(protocol)
        votes = model.votes([encoder.prompt_ids(...)], k=8, encoder=encoder, seed=1, max_tokens=512)

What a prompt has in common with one read before is not read again: the sequence that holds it is copied whole and cut.
So the k votes of a prompt share one prefill, and the responses of a prompt share what stands before them. Up to
`sequences` votes are live at once, each one token a step, and where one ends the next one begins. Logits are asked for
only where a token is drawn, and tokens are drawn in numpy (`sampling`).

llama.cpp ends the process where a call breaks its rules (too many tokens in a batch, an unknown token id, a part of a
sequence copied), so every number that goes into it is checked here first. One `LlamaCpp` serves one thread at a time.
"""

from __future__ import annotations

import ctypes
import hashlib
import heapq
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patarm_lite.errors import UserError
from patarm_lite.gguf_file import read_gguf
from patarm_lite.judge.frame import is_chatml
from patarm_lite.judge.grammar import SCORE_OPEN, TEN, Form, Rules
from patarm_lite.judge.loading import LOG, check_file, check_header, library, physical_cores
from patarm_lite.judge.sampling import draw, probabilities, race
from patarm_lite.judge.stock import StockVocabulary
from patarm_lite.metrics import expected_score
from patarm_lite.prompts import NO_THINKING, Encoder, Protocol
from patarm_lite.records import Verdict, Vote
from patarm_lite.verdicts import NOTHING_WRITTEN, parse

Ids = Sequence[int]
Floats = NDArray[np.float32]

BATCH = 512
"""Tokens of one call, at most. More is an abort in llama.cpp, so longer prompts go in pieces."""
ROWS = 128
"""Rows of logits of one call, at most: at 152k tokens a row is 0.6 MB."""
MOST_SEQUENCES = 256
"""llama.cpp's own limit."""
CELLS = 256
"""The cache of a sequence grows in steps of this many tokens."""
LEAST_SHARED = 16
"""Fewer common tokens are read again: copying a sequence costs more."""
MEMORY = 4 << 30
"""Bytes that the cache may take. Qwen3-0.6B takes 114,688 a token, Qwen3-8B 147,456."""
DECODINGS = ("free", "constrained")
CACHES = ("f16", "f32")
OPEN, CLOSE = "<score>", "</score>"
ADDED_KINDS = (3, 4)
"""Control and user-defined, in a file's `tokenizer.ggml.token_type`."""


@dataclass(slots=True)
class Work:
    """What the engine has done since it was loaded; benchmarks read it.

    `read`: prompt tokens computed. `shared`: prompt tokens copied instead. `fed`: tokens of judgements computed, in
    `steps` calls. `forced`: tokens that the protocol wrote. `drawn`: tokens drawn, `raced` of them a second time,
    since the first draw was not allowed. `decoding` and `sampling`: seconds in llama.cpp, and in choosing tokens.
    """

    read: int = 0
    shared: int = 0
    fed: int = 0
    steps: int = 0
    forced: int = 0
    drawn: int = 0
    raced: int = 0
    decoding: float = 0.0
    sampling: float = 0.0


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
    ten: float = 0.0
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
        stock: somebody else's vocabulary; None where the protocol's own frame and a Qwen-like vocabulary are read.
        context: tokens that a prompt and its judgement may have together.
        work: counts and seconds since loading.
    """

    def __init__(self, path: Path, model: Any, settings: dict[str, Any]) -> None:
        llama = library()
        self.path = path
        self._llama, self._model, self._settings = llama, model, settings
        self._vocabulary = llama.llama_model_get_vocab(model)
        self.vocab_size = int(llama.llama_vocab_n_tokens(self._vocabulary))
        self.context = min(settings["context"], int(llama.llama_model_n_ctx_train(model)))
        self._pieces: dict[int, bytes] = {}
        metadata = read_gguf(path).metadata
        self.stock = None if is_chatml(metadata) else self._stock_vocabulary(metadata)
        self._encoders: dict[Protocol, Encoder] = {}
        self.added = added_tokens(metadata) if self.stock is None else self.stock.added
        self._cell = cell_numbers(metadata) * (2 if settings["cache"] == llama.GGML_TYPE_F16 else 4)
        self._spelled = re.compile(f"({'|'.join(map(re.escape, sorted(self.added, key=len, reverse=True)))})")
        self._context: Any = None
        self._room = self._streams = self._turn = 0
        self._held: dict[int, NDArray[np.int32]] = {}
        self._batch = _Batch(llama)
        self.work = Work()

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
        memory: int = MEMORY,
        check: bool = True,
        verbose: bool = False,
    ) -> LlamaCpp:
        """Load a GGUF file, without memory mapping: a file that changes later changes nothing.

        Args:
            path: the file.
            context: tokens that a prompt and its judgement may have together, at most; the model's own limit holds
                too. Memory is taken for what a call needs, not for this.
            sequences: votes that are written at once, at most; 1 to 256.
            threads: by default OMP_NUM_THREADS where that is set, else the physical cores this process may use.
            cache: `f16`, or `f32` for comparisons.
            flash_attention: off for comparisons.
            memory: bytes that the cache may take: long prompts are judged fewer at once, but at least one.
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
            "memory": memory,
            "cache": llama.GGML_TYPE_F16 if cache == "f16" else llama.GGML_TYPE_F32,
            "flash": llama.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash_attention else llama.LLAMA_FLASH_ATTN_TYPE_DISABLED,
        }
        try:
            return cls(path, model, settings)
        except UserError:
            llama.llama_model_free(model)
            raise

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
        if self.stock is not None:
            return self.stock.tokenize(text)
        ids: list[int] = []
        for place, part in enumerate(self._spelled.split(text) if self.added else [text]):
            ids += [self.added[part]] if place % 2 else self._plain_ids(part)
        return ids

    def _plain_ids(self, text: str, special: bool = False) -> list[int]:
        data = text.encode("utf-8", "replace")
        if not data:
            return []
        room = 2 * len(data) + 8  # a space before the text and behind each special token is three bytes at most
        ids = (self._llama.llama_token * room)()
        count = self._llama.llama_tokenize(self._vocabulary, data, len(data), ids, room, False, special)
        if count < 0:
            raise AssertionError(f"{len(data)} bytes became {-count} tokens")
        return list(ids[:count])

    def _stock_vocabulary(self, metadata: Mapping[str, Any]) -> StockVocabulary:
        llama, vocabulary, every = self._llama, self._vocabulary, range(self.vocab_size)
        kinds = [int(llama.llama_vocab_get_attr(vocabulary, index)) for index in every]
        ending = frozenset(index for index in every if llama.llama_vocab_is_eog(vocabulary, index))
        begins = bool(llama.llama_vocab_get_add_bos(vocabulary))
        try:
            return StockVocabulary(metadata, kinds, ending, self._plain_ids, self.piece, begins)
        except UserError as error:
            raise UserError(f"{self.path} can't be asked: {error}") from None

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
        """The prompt encoder of this vocabulary; by the file's own chat template for somebody else's model.

        Raises:
            UserError: a template or a vocabulary that can't be used.
        """
        if self.stock is None:
            return Encoder(self.tokenize, self.added, protocol)
        if protocol not in self._encoders:
            try:
                self._encoders[protocol] = self.stock.encoder(protocol)
            except UserError as error:
                raise UserError(f"{self.path} can't be asked: {error}") from None
        return self._encoders[protocol]

    def chat_vocabulary(self) -> StockVocabulary:
        """The vocabulary with the file's own chat template, whoever's file it is: for chats, which no protocol frames.

        Raises:
            UserError: a vocabulary that can't be used.
        """
        return self.stock or self._stock_vocabulary(read_gguf(self.path).metadata)

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

    def scores(
        self, prompts: Sequence[Ids], *, encoder: Encoder, opening: str = NOTHING_WRITTEN
    ) -> list[tuple[float | None, float]]:
        """Expected score and digit mass of each prompt where the judge must score at once, with nothing written before.

        That is another judge than the one that writes its findings: how far both agree is to be measured. It costs one
        prefill and one token more, for the way on from a "1".

        Args:
            prompts: P lists of ids.
            encoder: this vocabulary's, see `encoder`.
            opening: what is forced before the digits; it ends with `<score>`.

        Raises:
            UserError: a prompt that doesn't fit the context, or a model that answers NaN.
        """
        before = self.tokenize((NO_THINKING if encoder.protocol.thinking else "") + opening)
        digits = [_only(self.tokenize(str(digit)), digit) for digit in range(10)]
        ways = [digits[0], self.tokenize(CLOSE)[0]]
        whole_ten = self.tokenize(TEN)
        self._check_prompts(prompts, len(before) + 1)
        if not prompts:
            return []
        slots = self._make_room(max(map(len, prompts)) + len(before) + 1, len(prompts))
        self._clear()
        found: list[tuple[float | None, float]] = []
        for first in range(0, len(prompts), slots):
            asked = [np.array([*prompt, *before], np.int32) for prompt in prompts[first : first + slots]]
            ones, tens = [], []
            for slot, ids in enumerate(asked):
                row = self._read(ids, slot)
                _finite(row.max(axis=1), self.path)
                ones.append(probabilities(row[0], digits[1:]))
                tens.append(sum(probabilities(row[0], whole_ten)) if len(whole_ten) == 1 else 0.0)
            count = len(asked)
            rows = self._decode([digits[1]] * count, list(map(len, asked)), range(count), [True] * count)
            _finite(rows.max(axis=1), self.path)
            for one, ten, row in zip(ones, tens, rows, strict=True):
                zero, close = probabilities(row, ways)
                found.append(expected_score(one, zero, close, ten))
        return found

    # votes

    def votes(
        self,
        prompts: Sequence[Ids],
        k: int,
        *,
        encoder: Encoder,
        seed: int,
        first: int = 0,
        temperature: float = 1.0,
        decoding: str = "free",
        max_tokens: int,
        expected: bool = True,
        progress: Callable[[int, int], None] | None = None,
        deterministic: bool = False,
    ) -> list[tuple[Vote, ...]]:
        """k votes for each prompt (token ids), in the order given; those with the indices from `first` on.

        Arguments and errors are those of `stream`; `progress` is called with (prompts done, P).
        """
        if k < 1:
            raise UserError(f"k is {k} and must be at least 1")
        found: list[dict[int, Vote]] = [{} for _ in prompts]
        done = 0
        for place, index, vote in self.stream(
            [(prompt, range(first, first + k)) for prompt in prompts],
            encoder=encoder,
            seed=seed,
            temperature=temperature,
            decoding=decoding,
            max_tokens=max_tokens,
            expected=expected,
            deterministic=deterministic,
        ):
            found[place][index] = vote
            if len(found[place]) == k:
                done += 1
                if progress is not None:
                    progress(done, len(prompts))
        return [tuple(votes[index] for index in sorted(votes)) for votes in found]

    def stream(
        self,
        asked: Sequence[tuple[Ids, Sequence[int]]],
        *,
        encoder: Encoder,
        seed: int,
        temperature: float = 1.0,
        top_k: int = 0,
        decoding: str = "free",
        max_tokens: int,
        expected: bool = True,
        deterministic: bool = False,
        keep: bool = False,
        form: Callable[[], Form] | Sequence[Callable[[], Form]] | None = None,
        read: Callable[[int, str, bool], Verdict] | None = None,
    ) -> Iterator[tuple[int, int, Vote]]:
        """Votes as they are finished: (place in `asked`, index of the vote, vote).

        The chance that draws a token is fixed by (seed, prompt, vote's index, place of the token), by nothing else: two
        quantizations of one judge draw alike, and the first 8 votes of 16 are the 8 votes of 8. Logits differ in their
        last bits with what else stands in a batch, so now and then a vote does too, unless `deterministic`.

        Args:
            asked: prompts as ids, each with the indices of the votes wanted. Prompts that begin alike are best given
                one after another.
            encoder: this vocabulary's, see `encoder`.
            seed: of the draws.
            temperature: 0 takes the likeliest token. The full distribution otherwise (top_p 1).
            top_k: only the k likeliest tokens; 0, the default, is all of them.
            decoding: `free`, or `constrained` to the protocol's form: readable by construction.
            max_tokens: of a judgement, its end token included.
            expected: whether the expected score is measured too (at temperature 1, whatever the grammar forbids).
            deterministic: one prompt at a time, from an empty cache: its votes are the same, bit for bit, whatever
                else is asked for, on one machine with the same indices, `sequences` and threads. Slower.
            keep: whether what the last call read may be used: for more votes on the same prompts.
            form: makes the form that constrains a judgement, in place of the protocol's; or one such for each prompt.
            read: what reads a judgement, in place of `verdicts.parse`: (place in `asked`, text, whether it ended).

        Raises:
            UserError: a prompt that doesn't fit the context, too few tokens for any judgement in constrained decoding,
                or a model that answers NaN.
            ValueError: the model was used for something else, or closed, before all votes were taken.
        """
        if decoding not in DECODINGS:
            raise UserError(f"decoding {decoding!r} is not one of {', '.join(DECODINGS)}")
        if max_tokens < 1 or temperature < 0 or top_k < 0:
            raise UserError(
                f"max_tokens {max_tokens} must be at least 1, temperature {temperature} and top_k {top_k} at least 0"
            )
        if any(index < 0 for _, indices in asked for index in indices):
            raise UserError("the index of a vote must be at least 0")
        self._check_prompts([prompt for prompt, _ in asked], max_tokens)
        votes = sum(len(indices) for _, indices in asked)
        if not votes:
            return iter(())
        if decoding == "constrained" and form is None:
            rules = self.rules_of(encoder)
            rules.check_budget(max_tokens)
            form = partial(Form, rules, max_tokens)
        forms = [form] * len(asked) if form is None or callable(form) else form
        if read is None:
            read = partial(_whole, encoder.protocol.thinking)
        run = _Run(self, asked, encoder, seed, temperature, top_k, forms, read, max_tokens, expected, deterministic)
        longest = max(len(prompt) for prompt, indices in asked if indices)
        slots = self._make_room(longest + max_tokens + 1, votes)
        if keep and not deterministic:
            self._turn += 1
        else:
            self._clear()
        return run.votes(slots)

    @cached_property
    def _rules(self) -> dict[tuple[bool, int], Rules]:
        return {}

    def rules_of(self, encoder: Encoder) -> Rules:
        """The rules of constrained decoding for this vocabulary, made once."""
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

    def _check_prompts(self, prompts: Sequence[Ids], more: int) -> None:
        for number, prompt in enumerate(prompts):
            if not len(prompt):
                raise ValueError(f"prompt {number} has no tokens")
            self._check_ids(prompt)
            self._check_length(len(prompt), more, f"prompt {number + 1} of {len(prompts)}")

    def _make_room(self, tokens: int, votes: int) -> int:
        """A context for so many votes of at least that many tokens: how many of them may be written at once.

        That number depends on nothing that was asked before.
        """
        tokens = -(-tokens // CELLS) * CELLS
        fits = self._settings["memory"] // (tokens * self._cell)
        wanted = max(1, min(votes, self._settings["sequences"], fits))
        if self._context and tokens <= self._room and wanted <= self._streams:
            return int(wanted)
        larger = max(tokens, self._room), max(wanted, self._streams)
        affordable = larger[0] * larger[1] * self._cell <= self._settings["memory"]
        self._open_context(*(larger if affordable else (tokens, wanted)))
        return int(wanted)

    def _open_context(self, tokens: int, sequences: int) -> None:
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
        settings.swa_full = True  # with a window's tokens alone a sequence could not be cut
        settings.no_perf = True
        LOG.forget()
        self._context = llama.llama_init_from_model(self._model, settings)
        if not self._context:
            raise UserError(
                f"llama.cpp made no context of {sequences} sequences with {tokens} tokens each: {LOG.reason()};"
                " load the judge with fewer sequences, or allow it less memory"
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
        self._held = {}
        self._turn += 1

    def _clear(self) -> None:
        """An empty cache, and an end to the votes that were being written."""
        self._forget()
        self._turn += 1

    def _forget(self) -> None:
        self._llama.llama_memory_clear(self._memory, False)
        self._held = {}

    def _decode(self, tokens: Ids, places: Ids, slots: Ids, flags: Sequence[bool]) -> Floats:
        """One call of llama.cpp: the flagged rows' logits, in order. The array is llama.cpp's until the next call."""
        count, rows = len(tokens), sum(flags)
        fits = 0 < count <= self._largest and rows <= max(ROWS, self._streams)
        if not fits or max(places) >= self._room or min(slots) < 0 or max(slots) >= self._streams:
            raise AssertionError(f"a batch of {count} tokens and {rows} rows does not fit this context")
        LOG.forget()
        begun = time.perf_counter()
        status = self._llama.llama_decode(self._context, self._batch.of(tokens, places, slots, flags))
        self.work.decoding += time.perf_counter() - begun
        if status != 0:
            raise UserError(f"llama.cpp could not go on with {self.path} (status {status}): {LOG.reason()}")
        if not rows:
            return np.empty((0, self.vocab_size), np.float32)
        pointer = self._llama.llama_get_logits(self._context)
        if not pointer:
            raise AssertionError("llama.cpp gave no logits")
        return np.ctypeslib.as_array(pointer, (rows, self.vocab_size))

    def _read(self, ids: NDArray[np.int32], slot: int) -> Floats:
        """A prompt into a slot: the last token's logits [1, V]. What another slot knows of it is copied."""
        out = np.empty((0, self.vocab_size), np.float32)
        known = self._bring(ids, slot)
        for start in range(known, len(ids), self._largest):
            stop = min(start + self._largest, len(ids))
            flags = [row == len(ids) - 1 for row in range(start, stop)]
            out = self._decode(ids[start:stop].tolist(), range(start, stop), [slot] * (stop - start), flags)
        self._held[slot] = ids
        self.work.read += len(ids) - known
        self.work.shared += known
        return out

    def _repeat(self, ids: NDArray[np.int32], slot: int) -> None:
        """A prompt that was just read, into another slot (or the same one, where its vote has ended)."""
        if self._held.get(slot) is not ids:
            self._copy(next(other for other, held in self._held.items() if held is ids), slot)
        self._cut(slot, len(ids))
        self._held[slot] = ids

    def _bring(self, ids: NDArray[np.int32], slot: int) -> int:
        """The longest known beginning of `ids` into a slot, its last token left out, and nothing else: its length.

        A sequence is copied only where it knows more than `LEAST_SHARED` tokens beyond what the slot holds.
        """
        lengths = {id(held): _common(held, ids) for held in self._held.values()}
        source = max(self._held, key=lambda other: lengths[id(self._held[other])], default=slot)
        if slot in self._held:
            own = lengths[id(self._held[slot])]
            source = slot if lengths[id(self._held[source])] <= own + LEAST_SHARED else source
        known = min(len(ids) - 1, lengths[id(self._held[source])]) if source in self._held else 0
        if known < LEAST_SHARED:
            known, source = 0, slot
        if source != slot:
            self._copy(source, slot)
        self._held.pop(slot, None)
        if known:
            self._cut(slot, known)
        else:
            self._empty([slot])
        return known

    def _copy(self, source: int, slot: int) -> None:
        """A sequence into another slot, whole: between the caches of two sequences llama.cpp allows nothing else."""
        self._empty([slot])
        self._llama.llama_memory_seq_cp(self._memory, source, slot, -1, -1)

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
    """One call of `LlamaCpp.stream`: which vote stands in which sequence, and what it has written.

    The live votes always stand in the lowest slots, since llama.cpp computes sequences together only where their
    numbers follow one another: a new vote takes the lowest free slot, and when none waits the highest one moves into
    a gap.
    """

    def __init__(
        self,
        model: LlamaCpp,
        asked: Sequence[tuple[Ids, Sequence[int]]],
        encoder: Encoder,
        seed: int,
        temperature: float,
        top_k: int,
        forms: Sequence[Callable[[], Form] | None],
        read: Callable[[int, str, bool], Verdict],
        max_tokens: int,
        expected: bool,
        alone: bool,
    ) -> None:
        self.model, self.asked, self.encoder, self.read = model, asked, encoder, read
        self.seed, self.temperature, self.top_k, self.forms = seed, temperature, top_k, forms
        self.max_tokens, self.expected, self.alone = max_tokens, expected, alone
        self.open = _shortest_end(model, SCORE_OPEN, OPEN)
        self.close = model.tokenize(CLOSE)[0]
        ten = model.tokenize(TEN)
        self.ten = ten if len(ten) == 1 else []
        self.digits = [_only(model.tokenize(str(digit)), digit) for digit in range(10)] if expected else []
        self.live: list[_Live] = []
        self.beginning: list[_Live] = []
        self.free: list[int] = []
        self.finished: list[tuple[int, int, Vote]] = []
        self.reading = -1
        self.ids = np.empty(0, np.int32)
        self.digest = b""
        self.row = np.empty((0, 0), np.float32)

    def votes(self, slots: int) -> Iterator[tuple[int, int, Vote]]:
        """All votes, as they are finished, at most `slots` of them live."""
        return self._votes(slots, self.model._turn)

    def _votes(self, slots: int, turn: int) -> Iterator[tuple[int, int, Vote]]:
        model = self.model
        self.free = list(range(slots))
        waiting = deque((prompt, index) for prompt, (_, indices) in enumerate(self.asked) for index in indices)
        while waiting or self.live:
            model._alive()
            if model._turn != turn:
                raise ValueError("the model was used for something else before all votes were taken")
            try:
                while waiting and self.free and self._may_begin(waiting[0][0]):
                    self._begin(*waiting.popleft())
                self._begun()
                if self.live:
                    self._close_gaps()
                    self._step()
            except BaseException:
                model._held = {}
                raise
            yield from self.finished
            self.finished = []

    def _may_begin(self, prompt: int) -> bool:
        return not self.alone or prompt == self.reading or not self.live

    def _begin(self, prompt: int, vote: int) -> None:
        """Give a vote a slot that holds its prompt; before the first vote of a prompt, read the prompt."""
        model = self.model
        make = self.forms[prompt]
        form = make() if make else None
        opening = form.begin() if form is not None else []
        slot = heapq.heappop(self.free)
        if prompt != self.reading:
            self._begun()
            given = np.asarray(self.asked[prompt][0], np.int32)
            self.digest = hashlib.blake2b(given.tobytes(), digest_size=16).digest()
            self.ids = np.concatenate([given, np.asarray(opening, np.int32)])
            if self.alone:
                model._forget()
            self.row = model._read(self.ids, slot).copy()
            self.reading = prompt
        else:
            model._repeat(self.ids, slot)
        key = _key(self.seed, self.digest, vote)
        start = len(self.ids) - len(opening)
        uniforms = _uniforms(key, self.max_tokens)
        live = _Live(prompt, vote, slot, start, list(opening), len(opening), uniforms, key, form)
        model.work.forced += len(opening)
        self.live.append(live)
        self.beginning.append(live)

    def _begun(self) -> None:
        """Draw the first token of the votes that have just begun: all of one prompt."""
        lives, self.beginning = self.beginning, []
        if lives:
            self.live.sort(key=lambda live: live.slot)
            self._answer(lives, np.broadcast_to(self.row, (len(lives), self.row.shape[1])))

    def _close_gaps(self) -> None:
        while self.live and self.live[-1].slot >= len(self.live):
            live = self.live.pop()
            slot = heapq.heappop(self.free)
            self.model._copy(live.slot, slot)
            self.model._held[slot] = self.model._held[live.slot]
            heapq.heappush(self.free, live.slot)
            live.slot = slot
            self.live = sorted([*self.live, live], key=lambda live: live.slot)

    def _step(self) -> None:
        """Feed every live vote its next token, and draw the next where there is none."""
        tokens, places, flags = [], [], []
        asking: list[_Live] = []
        for live in self.live:
            asks = live.probing or live.fed == len(live.ids) - 1
            tokens.append(self.digits[1] if live.probing else live.ids[live.fed])
            places.append(live.start + live.fed)
            flags.append(asks)
            live.fed += 1
            if asks:
                asking.append(live)
        out = self.model._decode(tokens, places, [live.slot for live in self.live], flags)
        self.model.work.steps += 1
        self.model.work.fed += len(tokens)
        if asking:
            self._answer(asking, out)

    def _answer(self, lives: Sequence[_Live], logits: Floats) -> None:
        """Draw a token for each vote from its row of logits [L, V], and see what is finished."""
        begun = time.perf_counter()
        work = self.model.work
        highest = logits.max(axis=1)
        _finite(highest, self.model.path)
        chances = np.array([live.uniforms[min(len(live.ids), self.max_tokens - 1)] for live in lives])
        drawn = draw(logits, highest, chances, self.temperature, self.top_k)
        work.drawn += sum(not live.probing for live in lives)
        for live, token, row in zip(lives, drawn.tolist(), logits, strict=True):
            if self.expected:
                self._measure(live, row)
            if live.probing:
                self._end(live)
            elif live.form is None:
                live.ids.append(token)
                if token in self.encoder.ends or len(live.ids) == self.max_tokens:
                    self._finish(live)
            else:
                if not live.form.accepts(token):
                    token = race(row, self.temperature, live.key, len(live.ids), live.form)
                    work.raced += 1
                written = live.form.take(token)
                work.forced += len(written) - (token in written[:1])
                live.ids += written
                if live.form.done:
                    self._finish(live)
        work.sampling += time.perf_counter() - begun

    def _measure(self, live: _Live, row: Floats) -> None:
        """Keep the digits' probabilities after `<score>`, and after that the two ways on from a "1"."""
        if live.probing or (live.digit_at == len(live.ids) - 1 and live.ids[-1] == self.digits[1]):
            ten, one = probabilities(row, [self.digits[0], self.close])
            live.ten_or_one = (ten, one)
        elif live.ids[-len(self.open) :] == self.open:
            live.digits = probabilities(row, self.digits[1:])
            live.ten = sum(probabilities(row, self.ten)) if self.ten else 0.0
            live.digit_at, live.ten_or_one = len(live.ids), None

    def _finish(self, live: _Live) -> None:
        """Read what a vote has written. Where its expected score lacks the way on from "1", that is asked for."""
        ended = live.ids[-1] in self.encoder.ends
        live.text = self.model.text(live.ids[:-1] if ended else live.ids)
        live.verdict = self.read(live.prompt, live.text, ended)
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
            score, mass = expected_score(live.digits, *live.ten_or_one, live.ten)
        self.finished.append((live.prompt, live.vote, Vote(live.verdict, live.text, score, mass, len(live.ids))))
        self.live.remove(live)
        heapq.heappush(self.free, live.slot)


def _whole(thinking: bool, place: int, text: str, ended: bool) -> Verdict:
    """A judgement of form `own`, wherever it stands."""
    return parse(text, ended, thinking)


def added_tokens(metadata: Mapping[str, Any]) -> dict[str, int]:
    """Control and user-defined tokens as the file types them, spelling -> id."""
    tokens, kinds = metadata.get("tokenizer.ggml.tokens", ()), metadata.get("tokenizer.ggml.token_type", ())
    return {token: index for index, (token, kind) in enumerate(zip(tokens, kinds, strict=False)) if kind in ADDED_KINDS}


def cell_numbers(metadata: Mapping[str, Any]) -> int:
    """Numbers that the cache holds for one token: a key and a value for each layer and head. Where layers differ, all
    are taken for the largest."""

    def number(key: str, default: int) -> int:
        found = metadata.get(f"{metadata.get('general.architecture')}.{key}")
        if isinstance(found, list):
            found = max((value for value in found if isinstance(value, int)), default=None)
        return found if isinstance(found, int) and found > 0 else default

    heads = number("attention.head_count", 1)
    size = number("embedding_length", heads) // heads
    width = number("attention.key_length", size) + number("attention.value_length", size)
    return max(1, number("block_count", 1) * number("attention.head_count_kv", heads) * width)


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


def _shortest_end(model: LlamaCpp, text: str, wanted: str) -> list[int]:
    """The fewest last ids of a text that hold its end `wanted`."""
    ids = model.tokenize(text)
    return next(ids[-n:] for n in range(1, len(ids) + 1) if model.text(ids[-n:]).endswith(wanted))


def _only(ids: Ids, digit: int) -> int:
    if len(ids) != 1:
        raise UserError(f"the vocabulary writes the digit {digit} as {len(ids)} tokens; only single ones work here")
    return ids[0]


def _common(one: NDArray[np.int32], other: NDArray[np.int32]) -> int:
    """How many tokens two lists have in common at their beginning."""
    if one is other:
        return len(one)
    length = min(len(one), len(other))
    differing = one[:length] != other[:length]
    return int(differing.argmax()) if differing.any() else length


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
    return physical_cores()
