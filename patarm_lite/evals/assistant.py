"""Assistant models: what writes a response to a chat, behind one interface. A GGUF file, a folder, a hub id or a URL.

    with open_assistant("model.gguf") as model:
        for place, reply in model.replies([model.read(chat) for chat in chats], Drawing()):
            ...

Every model is asked in its own chat template, thinking off where the template lets that be chosen. A template from a
file is rendered around words of ours in a child process (`judge.frame`); the texts of a chat never pass through it and
can form no control token:

- A GGUF file gets token ids, texts spelled without special tokens (`judge.stock`). It is checked as a judge's is, and
  first loaded in a child process.
- A folder of safetensors gets the ids of the whole text, in which control and user-defined tokens of a chat are broken
  visibly (`<` becomes `‹`).
- A server gets messages, in which the tokens of Qwen3's vocabulary are broken likewise: its own template and vocabulary
  are not known here.

What a model wrote before in a chat stands behind the same words that it wrote it behind; Qwen3's template would leave
an empty thought out there.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol
from urllib.parse import urlsplit

from patarm_lite.errors import UserError, missing_extra
from patarm_lite.judge.endpoint import BUSY, Endpoint, Refused
from patarm_lite.prompts import BREAKS, QWEN3_TOKENS, break_at, inert_judgement
from patarm_lite.records import Turn, Verdict

Chat = Sequence[Turn]
Read = list[Any]
"""What a model reads of a chat: token ids, or messages. It is what tells two requests apart, so it is plain JSON."""

CONTEXT, PARALLEL, REQUESTS, BATCH = 8192, 32, 8, 8
"""Tokens of a chat and its reply, and replies written at once: by llama.cpp, by a server, by transformers."""
FILES = ("*.json", "*.jinja", "merges.txt", "model*.safetensors", "tokenizer.model")
"""Files of a hub model that are fetched."""
LIMITS = ("max_tokens", "max_completion_tokens")
OTHERS: tuple[dict[str, Any], ...] = (
    {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "repeat_penalty": 1.0},
    {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0},
    {},
)
SWITCHES: tuple[dict[str, Any], ...] = ({"chat_template_kwargs": {"enable_thinking": False}}, {})
"""What a request may hold beyond OpenAI's settings, tried in turn: servers differ in what they refuse."""
_HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True, slots=True)
class Drawing:
    """How replies are drawn: temperature 0 takes the likeliest token; above it the full distribution is sampled."""

    max_tokens: int = 2048
    temperature: float = 0.0
    seed: int = 1

    @property
    def words(self) -> str:
        seed = f", seed {self.seed}" if self.temperature else ""
        return f"temperature {self.temperature:g}{seed}, at most {self.max_tokens} tokens"


@dataclass(frozen=True, slots=True)
class Reply:
    """What a model wrote. `ended`: by itself; else it stopped at the limit of tokens."""

    text: str
    ended: bool
    tokens: int


class Assistant(Protocol):
    """A loaded model. `context`: tokens of a chat and its reply, None where that is not known. `form`: whether it gets
    token ids (`exact`) or messages (`text`). `about`: what else must be said of how it is asked, or ""."""

    name: str
    fingerprint: str
    context: int | None
    form: str
    about: str

    def read(self, chat: Chat) -> Read:
        """What the model reads of a chat that ends with a user's turn."""

    def replies(self, asked: Sequence[Read], drawing: Drawing) -> Iterator[tuple[int, Reply]]:
        """Replies as they are finished: (place in `asked`, reply).

        Raises:
            UserError: a model that can't go on.
        """

    def close(self) -> None:
        """Give memory and connections back."""

    def __enter__(self) -> Assistant: ...

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None: ...


class _Closing:
    """A model as a context manager."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


def open_assistant(
    place: str,
    *,
    threads: int | None = None,
    context: int | None = None,
    parallel: int | None = None,
    key: str | None = None,
    revision: str = "main",
    offline: bool = False,
) -> Assistant:
    """Load a model.

    Args:
        place: a GGUF file, a Hugging Face folder, a hub id, or `http://HOST:PORT/v1`, with `#NAME` where it serves
            several models.
        threads: CPU threads; by default as the backend chooses.
        context: tokens that a chat and its reply may have together, at most.
        parallel: replies written at once.
        key: of a server. revision: of a hub id.

    Raises:
        UserError: nothing there, a file that can't be used, or no chat template.
    """
    if place.startswith(("http://", "https://")):
        return ServedAssistant.load(place, key=key, parallel=parallel or REQUESTS, context=context)
    path = Path(place)
    if not path.exists() and _HUB.fullmatch(place) and not place.endswith(".gguf"):
        from patarm_lite import hub

        path = hub.snapshot("model", place, revision, offline, FILES)
    if path.is_dir():
        return FolderAssistant.load(path, threads=threads, context=context or CONTEXT, batch=parallel or BATCH)
    if not path.is_file():
        raise UserError(f"model {place!r} not found; give a GGUF file, a Hugging Face folder, a hub id or a URL")
    return GgufAssistant.load(path, threads=threads, context=context or CONTEXT, sequences=parallel or PARALLEL)


# --- a GGUF file ---


class GgufAssistant(_Closing):
    """A GGUF file through llama.cpp, in this process."""

    name = "llamacpp"
    form = "exact"
    about = ""

    def __init__(self, model: Any, fingerprint: str) -> None:
        from patarm_lite.prompts import Protocol as PromptProtocol

        self.fingerprint, self.context = fingerprint, model.context
        self._model, self._vocabulary = model, model.chat_vocabulary()
        try:
            self._encoder = self._vocabulary.encoder(PromptProtocol())
        except UserError as error:
            raise UserError(f"{model.path}: {error}") from None

    @classmethod
    def load(cls, path: Path, *, threads: int | None, context: int, sequences: int) -> GgufAssistant:
        from patarm_lite.judge.description import fingerprint
        from patarm_lite.judge.llamacpp import LlamaCpp

        model = LlamaCpp.load(path, context=context, sequences=sequences, threads=threads)
        try:
            return cls(model, fingerprint(path))
        except BaseException:
            model.close()
            raise

    def read(self, chat: Chat) -> list[int]:
        vocabulary, frame, ids = self._vocabulary, self._encoder.frame, []
        for place, turn in enumerate(_checked(chat)):
            if turn.role == "assistant":
                if frame.again is None:
                    raise UserError(
                        f"{self._model.path}: its chat template takes no second question; take another model"
                    )
                ids += [*_plain(vocabulary, turn), self._encoder.end_id, *vocabulary.again(frame.again)]
            else:
                ids += [*([] if place else vocabulary.begin(frame.user)), *_plain(vocabulary, turn)]
                ids += vocabulary.template(frame.assistant)
        return ids

    def replies(self, asked: Sequence[Read], drawing: Drawing) -> Iterator[tuple[int, Reply]]:
        stream = self._model.stream(
            [(ids, [0]) for ids in asked],
            encoder=self._encoder,
            seed=drawing.seed,
            temperature=drawing.temperature,
            max_tokens=drawing.max_tokens,
            expected=False,
            keep=True,
            read=lambda place, text, ended: Verdict(None, None if ended else "truncated"),
        )
        for place, _, vote in stream:
            yield place, Reply(vote.text, vote.verdict.problem is None, vote.tokens)

    def close(self) -> None:
        self._model.close()


def _plain(vocabulary: Any, turn: Turn) -> list[int]:
    """Ids of a text, none of them special: NFC, as transformers reads it for Qwen and llama.cpp doesn't."""
    return list(vocabulary.plain(inert_judgement(turn.content, ())))


def _checked(chat: Chat) -> Chat:
    """A chat of user and assistant in turn, which a user's turn begins and ends."""
    if [turn.role for turn in chat] != [("user", "assistant")[place % 2] for place in range(len(chat) | 1)]:
        raise ValueError(f"a chat with the roles {', '.join(turn.role for turn in chat)}")
    return chat


# --- a folder ---


class FolderAssistant(_Closing):
    """A Hugging Face folder through transformers."""

    context: int | None
    name = "transformers"
    form = "exact"
    about = ""

    def __init__(self, folder: Path, model: Any, tokenizer: Any, fingerprint: str, context: int, batch: int) -> None:
        from patarm_lite.judge.frame import read_template

        self.fingerprint, self.context, self._batch, self._folder = fingerprint, context, batch, folder
        self._model, self._tokenizer = model, tokenizer
        added = {token.content for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
        spelled = [token for token in added if token.strip()]
        stubborn = sorted(t for t in spelled if break_at(t) is None or not set(BREAKS.values()).isdisjoint(t))
        if stubborn:
            raise UserError(
                f"{folder} has a special token {stubborn[0]!r}, which can't be told from the text of a chat"
            )
        self._added = tuple(sorted(spelled))
        try:
            self._template = read_template(_metadata(tokenizer))
        except UserError as error:
            raise UserError(f"{folder}: {str(error).replace('the file', 'the folder')}") from None
        ends = model.generation_config.eos_token_id
        found = [*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id]
        self._ends = sorted({token for token in found if token is not None})
        if not self._ends:
            raise UserError(f"{folder} names no token that ends an answer (eos_token), so no reply would ever end")

    @classmethod
    def load(cls, folder: Path, *, threads: int | None, context: int, batch: int) -> FolderAssistant:
        try:
            import torch
            import transformers  # noqa: F401
        except ImportError as error:
            raise missing_extra("train", error.name or "torch") from None
        from patarm_lite.judge.transformers_backend import fingerprint, judge_folder
        from patarm_lite.recipe import ModelSection
        from patarm_lite.training.engine import TransformersEngine, prepare_libraries, settle

        folder = judge_folder(folder)
        if not any(folder.glob("*.safetensors")):
            raise UserError(f"{folder} holds no safetensors, and no other weights are read; convert the model")
        prepare_libraries(threads)
        model, tokenizer = TransformersEngine().load(str(folder), ModelSection())
        settle(model)
        if torch.cuda.is_available():
            model = model.to("cuda")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        most = min(context, int(getattr(model.config, "max_position_embeddings", context)))
        return cls(folder, model.eval(), tokenizer, fingerprint(folder), most, batch)

    def read(self, chat: Chat) -> list[int]:
        parts = [self._template.user]
        for turn in _checked(chat):
            parts.append(inert_judgement(turn.content, self._added))
            if turn.role == "user":
                parts.append(self._template.assistant)
            elif self._template.between is None:
                raise UserError(f"{self._folder}: its chat template takes no second question; take another model")
            else:
                parts.append(self._template.between)
        return list(self._tokenizer.encode("".join(parts), add_special_tokens=False))

    def replies(self, asked: Sequence[Read], drawing: Drawing) -> Iterator[tuple[int, Reply]]:
        order = sorted(range(len(asked)), key=lambda place: len(asked[place]))
        for start in range(0, len(order), self._batch):
            places = order[start : start + self._batch]
            for place, ids in zip(places, self._written([asked[place] for place in places], drawing), strict=True):
                ended = ids[-1:] != [] and ids[-1] in self._ends
                text = self._tokenizer.decode(ids[: len(ids) - ended], clean_up_tokenization_spaces=False)
                yield place, Reply(text, ended, len(ids))

    def _written(self, prompts: Sequence[Any], drawing: Drawing) -> list[list[int]]:
        """Ids of the reply to each prompt, its end token included where there is one."""
        import numpy as np
        import torch
        from transformers import LogitsProcessorList

        from patarm_lite.judge.transformers_backend import _Draw, vote_chances

        if self._model is None:
            raise ValueError("the model was closed")
        pad, longest = self._tokenizer.pad_token_id, max(map(len, prompts))
        ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        options: dict[str, Any] = {}
        if drawing.temperature > 0:
            drawn = [vote_chances(drawing.seed, prompt, 0, drawing.max_tokens) for prompt in prompts]
            options["logits_processor"] = LogitsProcessorList([_Draw(np.stack(drawn), drawing.temperature, longest)])
        with torch.no_grad():
            out = self._model.generate(
                input_ids=ids.to(self._model.device),
                attention_mask=mask.to(self._model.device),
                do_sample=False,
                max_new_tokens=drawing.max_tokens,
                eos_token_id=self._ends,
                pad_token_id=pad,
                **options,
            )
        return [_until_end(row, self._ends) for row in out[:, longest:].tolist()]

    def close(self) -> None:
        self._model = None


def _until_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    """Ids up to the first end token, and with it.

    >>> _until_end([5, 6, 2, 0, 0], [2]), _until_end([5, 6], [2])
    ([5, 6, 2], [5, 6])
    """
    found = next((place for place, token in enumerate(ids) if token in ends), None)
    return ids if found is None else ids[: found + 1]


def _metadata(tokenizer: Any) -> dict[str, Any]:
    """A tokenizer's chat template and special tokens as a GGUF file would name them."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    known = {name: token for name, field in names.items() if (token := getattr(tokenizer, field, None)) is not None}
    found = {f"tokenizer.ggml.{name}_token_id": place for place, name in enumerate(known)}
    return {"tokenizer.chat_template": template, "tokenizer.ggml.tokens": list(map(str, known.values())), **found}


# --- a server ---


class ServedAssistant(_Closing):
    """An OpenAI-compatible server, by `/chat/completions`. A server shows no weights: another model under the same name
    and address has the same fingerprint."""

    name = "openai"
    form = "text"

    def __init__(
        self,
        url: str,
        model: str,
        known: Mapping[str, Any],
        key: str | None,
        parallel: int,
        context: int | None,
        limit: str,
        extra: Mapping[str, Any],
    ) -> None:
        self.url, self.model, self.context = url, model, context
        self._key, self._parallel, self._limit, self._extra = key, parallel, limit, extra
        told = [url, model, known, limit, extra]
        self.fingerprint = hashlib.sha256(b"patarm-lite chat server 1\n" + json.dumps(told).encode()).hexdigest()
        left = [] if set(SWITCHES[0]) <= set(extra) else ["whether it thinks"]
        left += [] if "repeat_penalty" in extra else ["sampling beyond temperature and top_p"]
        self.about = f"the server decides {' and '.join(left)}" if left else ""

    @classmethod
    def load(cls, url: str, *, key: str | None, parallel: int, context: int | None) -> ServedAssistant:
        from patarm_lite.judge.openai_backend import UNKNOWN_CONTEXT, _choose_model, _context, _lasting

        url, _, name = url.partition("#")
        if urlsplit(url).path in ("", "/"):
            url = url.rstrip("/") + "/v1"
        server = Endpoint(url, key=key)
        try:
            about = _choose_model(server, name)
            found = _context(server, about)
            limit, extra = _accepted(server, str(about["id"]))
        finally:
            server.close()
        known = None if found == UNKNOWN_CONTEXT else found
        return cls(server.url, str(about["id"]), _lasting(about), key, parallel, context or known, limit, extra)

    def read(self, chat: Chat) -> list[dict[str, str]]:
        return [{"role": turn.role, "content": inert_judgement(turn.content, QWEN3_TOKENS)} for turn in _checked(chat)]

    def replies(self, asked: Sequence[Read], drawing: Drawing) -> Iterator[tuple[int, Reply]]:
        """As `Assistant.replies`. When one request fails for good, replies that are under way are still given out
        before the error."""
        server = Endpoint(self.url, key=self._key)
        pool = ThreadPoolExecutor(self._parallel, thread_name_prefix="patarm-lite-replies")
        waiting = iter(range(len(asked)))
        running: dict[Future[Reply | None], int] = {}
        failed: BaseException | None = None

        def reply(place: int) -> Reply | None:
            if server.given_up:
                return None
            try:
                return _answered(server, self._body(asked[place], drawing))
            except Refused as refused:
                server.give_up()
                about = f"{asked[place][-1]['content'][:60]!r} (status {refused.status}): {refused.said}"
                raise UserError(f"{self.url} refused the chat that ends with {about}") from None
            except BaseException:
                server.give_up()
                raise

        try:
            while True:
                while failed is None and len(running) < 2 * self._parallel and (place := next(waiting, -1)) >= 0:
                    running[pool.submit(reply, place)] = place
                if not running:
                    break
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    place = running.pop(done)
                    failed = failed or done.exception()
                    if done.exception() is None and (found := done.result()) is not None:
                        yield place, found
        finally:
            server.abort()
            pool.shutdown(wait=True, cancel_futures=True)
        if failed is not None:
            raise failed

    def _body(self, messages: Read, drawing: Drawing) -> dict[str, Any]:
        return _body(self.model, messages, drawing, self._limit, self._extra)

    def close(self) -> None:
        """Nothing is held between calls."""


def _accepted(server: Endpoint, model: str) -> tuple[str, dict[str, Any]]:
    """How the server takes the limit of tokens, and which settings beyond OpenAI's: found by requests of one token.

    Raises:
        UserError: it answers no chat at all.
    """
    said = ""
    for switch, more, limit in product(SWITCHES, OTHERS, LIMITS):
        extra = {**more, **switch}
        try:
            _answered(server, _body(model, [{"role": "user", "content": "Hello."}], Drawing(1), limit, extra))
            return limit, extra
        except Refused as refused:
            said = str(refused)
    raise UserError(f"{server.url} answers no chats (/chat/completions: {said}); give the address of a chat model")


def _body(
    model: str, messages: Sequence[Any], drawing: Drawing, limit: str, extra: Mapping[str, Any]
) -> dict[str, Any]:
    settings = {"temperature": drawing.temperature, "top_p": 1, "seed": drawing.seed, limit: drawing.max_tokens}
    return {"model": model, "messages": list(messages), **settings, **extra}


def _answered(server: Endpoint, body: Mapping[str, Any]) -> Reply:
    """Ask, and read the answer. Some servers answer 500 to what they don't know: that is not asked again."""
    data = server.ask("/chat/completions", dict(body), busy=set(BUSY) - {500})
    choices = data.get("choices") if isinstance(data, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        raise Refused(200, f"an answer without a message: {json.dumps(data)[:120]}")
    text = message.get("content")
    text = text if isinstance(text, str) else ""  # null where it only thought, or refuses
    usage = data.get("usage") if isinstance(data.get("usage"), dict) else {}
    tokens = usage.get("completion_tokens")
    sound = text.encode("utf-8", "replace").decode("utf-8")
    return Reply(sound, choice.get("finish_reason") != "length", tokens if isinstance(tokens, int) else 0)
