"""The parity gate: does a converted judge read the same tokens and compute the same numbers as the trained one?

Three questions, each answered at every export, each failing it:

- *Tokens.* The trainer's tokenizer, the merged folder's and llama.cpp's give equal ids for some thousand hard strings,
  as plain text and as contents of a judging prompt, and for real judging prompts and judgements. Besides, the lists of
  tokens and merges and the end token are compared one by one: no sample of strings covers 150,000 merges.
- *Template.* The chat template in the file is the trained judge's, and llama-cpp-python renders it alike.
- *Logits.* torch in f32 from the merged folder against llama.cpp in f32 from the file's own bytes, widened: f32 cache,
  no flash attention. Within 1e-3 of the logits' standard deviation, and the same best token wherever the best two are
  further apart than twice that.

Where the model is small against the free memory all of it is compared. Elsewhere a copy of the embedding, the first
two and the last layer, the final norm and the head is, and the weights of the layers between are compared one by one.

Weights that have to be rounded to the file's 16 bits (those of an f32 folder) are rounded on torch's side too: the
gate asks whether the file holds this judge, not what 16 bits cost. What they cost is measured apart (`rounding`).
"""

from __future__ import annotations

import json
import shutil
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from patarm_lite.errors import UserError
from patarm_lite.gguf_file import GgufFile, read_gguf
from patarm_lite.judge.llamacpp import LlamaCpp
from patarm_lite.prompts import Encoder, Protocol
from patarm_lite.quantize.budget import PARITY_SHARE
from patarm_lite.quantize.budget import free_memory as memory_here
from patarm_lite.quantize.convert import bf16
from patarm_lite.quantize.hard_strings import hard_strings
from patarm_lite.quantize.modelfile import completion_prompt
from patarm_lite.quantize.tensors import TensorFolder
from patarm_lite.quantize.widen import blocks, layers_of, widen, widened_bytes
from patarm_lite.records import TASKS, Rubric, Turn
from patarm_lite.rubrics import primary_rubric

TOLERANCE = 1e-3
"""Largest difference of two logits, in standard deviations of the logits. Measured between torch and llama.cpp in f32:
4e-5 on four layers; with an f16 cache 5e-3, with bf16 weights 6e-2."""
POSITIONS = 256
"""Positions at which logits are compared: 152k logits each in f32 are 160 MB."""
TOKENS, LONGEST = 1000, 600
"""Tokens that run through both models, at least where there are so many; tokens of one text at most."""
LONG_TOKENS = 400
"""Tokens of more than 32 bytes that are tried at most: Qwen's vocabulary has some hundred."""

_LAYER_TENSORS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OTHER_TENSORS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


class ParityError(UserError):
    """The converted judge is not the trained one. Says where they first differ."""


@dataclass(frozen=True, slots=True)
class JudgingText:
    """One response to be judged and, where there is one, the judgement written about it."""

    prompt: tuple[Turn, ...]
    response: str
    task: str
    rubric: Rubric
    judgement: str = ""
    reference: str | None = None


@dataclass(frozen=True, slots=True)
class Parity:
    """What the gate found.

    Attributes:
        strings: hard strings compared, as text and as contents.
        prompts: judging prompts compared, judgements included.
        template_equal: None where the trained judge has no chat template.
        template_is_protocol: whether rendering the template gives the judging prompt; where it doesn't, chat servers
            show this judge another prompt than it was trained on.
        logits: `whole` or `truncated`. layers: the layers that ran.
        weights_compared: tensors of the other layers, compared value by value.
        max_logit_diff: largest difference of a logit. logit_std: standard deviation of all logits compared.
        rounding: largest difference of a logit that rounding the weights to the file's 16 bits makes.
    """

    strings: int
    tokens_equal: bool
    prompts: int
    template_equal: bool | None
    template_is_protocol: bool
    logits: str
    layers: list[int]
    weights_compared: int
    max_logit_diff: float
    logit_std: float
    rounding: float
    positions: int
    top1_equal: bool
    seconds: float


def check(
    source_tokenizer_folder: Path,
    merged: Path,
    gguf: Path,
    work: Path,
    *,
    protocol: Protocol,
    judging_prompts: Sequence[JudgingText],
    threads: int = 1,
    free_memory: float | None = None,
) -> Parity:
    """Compare a 16-bit or f32 GGUF file with the judge it was made from.

    Args:
        source_tokenizer_folder: the trainer's tokenizer. merged: the folder the file was converted from.
        work: a folder for the f32 copy, which is removed again whatever happens.
        judging_prompts: real ones; without any, prompts of hard strings alone are compared.
        free_memory: bytes; by default what is free.

    Raises:
        ParityError: naming the first difference.
        UserError: a file or folder that can't be read.
    """
    begun = time.monotonic()
    file = read_gguf(gguf)
    trainer = _tokenizer(source_tokenizer_folder)
    strings = hard_strings(sorted(_added(trainer)), _long_tokens(trainer))
    texts = [*_hard_texts(strings), *judging_prompts]
    if merged.resolve() != source_tokenizer_folder.resolve():
        _check_merged_tokenizer(trainer, merged, protocol, strings, texts)
    _check_lists(trainer, file)
    _check_template_equal(trainer, file)
    layers = _layers(file, memory_here() if free_memory is None else free_memory, work)
    compared = _check_weights(merged, file, layers)
    side = _side("the trainer", trainer, protocol)
    copy = work / "parity.gguf"
    try:
        work.mkdir(parents=True, exist_ok=True)
        widen(file, copy, layers)
        with _llama(copy, threads) as llama:
            _check_tokens(side, _Side("llama.cpp", llama.tokenize, llama.encoder(protocol)), strings, texts)
            places = _places([_ids(side.encoder, text) for text in texts], min(LONGEST, llama.context))
            found = np.concatenate([llama.logits(ids, rows) for ids, rows in places])
    finally:
        copy.unlink(missing_ok=True)
    expected, rounding = _expected(merged, file, layers, places, threads)
    difference, deviation = _check_logits(expected, found, places)
    return Parity(
        strings=len(strings),
        tokens_equal=True,
        prompts=len(texts),
        template_equal=None if trainer.chat_template is None else True,
        template_is_protocol=_renders(trainer, protocol),
        logits="whole" if len(layers) == layers_of(file) else "truncated",
        layers=list(layers),
        weights_compared=compared,
        max_logit_diff=difference,
        logit_std=deviation,
        rounding=rounding,
        positions=len(found),
        top1_equal=True,
        seconds=round(time.monotonic() - begun, 1),
    )


# --- tokens ---


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the tokenizer in {folder} can't be loaded ({reason}); is the folder whole?") from None


def _added(tokenizer: Any) -> dict[str, int]:
    return {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}


def _long_tokens(tokenizer: Any) -> list[str]:
    """Tokens of more than 32 bytes, spelled out; evenly picked where there are many."""
    ids = sorted(index for token, index in tokenizer.get_vocab().items() if len(token) > 32)
    step = max(1, -(-len(ids) // LONG_TOKENS))
    return [tokenizer.decode([index], clean_up_tokenization_spaces=False) for index in ids[::step]]


def _hard_texts(strings: Sequence[str]) -> list[JudgingText]:
    """Judging prompts of hard strings: one per task, prompt and response and judgement full of them."""
    found = []
    for place, task in enumerate(TASKS):
        few = [string for string in strings[place :: len(strings) // 24] if len(string) < 60]
        turns = (Turn("user", " ".join(few[:6])), Turn("assistant", few[6]), Turn("user", few[7]))
        found.append(JudgingText(turns, "\n".join(few[8:20]), task, primary_rubric(task), "".join(few[:3])))
    return found


def _ids(encoder: Encoder, text: JudgingText) -> list[int]:
    """Ids of a judging prompt and its judgement."""
    ids = encoder.prompt_ids(text.prompt, text.response, task=text.task, rubric=text.rubric, reference=text.reference)
    return [*ids, *encoder.judgement_ids(text.judgement)]


@dataclass(frozen=True, slots=True)
class _Side:
    """One tokenizer: what it is called, text -> ids with control tokens read, and its encoder of judging prompts."""

    name: str
    encode: Callable[[str], list[int]]
    encoder: Encoder


def _side(name: str, tokenizer: Any, protocol: Protocol) -> _Side:
    encoder = Encoder.from_tokenizer(tokenizer, protocol)
    return _Side(name, lambda text: tokenizer.encode(text, add_special_tokens=False), encoder)


def _check_merged_tokenizer(
    trainer: Any, merged: Path, protocol: Protocol, strings: Sequence[str], texts: Sequence[JudgingText]
) -> None:
    tokenizer = _tokenizer(merged)
    one, other = _side("the trainer", trainer, protocol), _side("the merged folder", tokenizer, protocol)
    _check_tokens(one, other, strings, texts)
    if trainer.eos_token_id != tokenizer.eos_token_id:
        raise ParityError(
            f"the trainer ends a judgement with token {trainer.eos_token_id}, {merged} with "
            f"{tokenizer.eos_token_id}; copy the judge's own tokenizer files into the folder"
        )


def _check_tokens(one: _Side, other: _Side, strings: Sequence[str], texts: Sequence[JudgingText]) -> None:
    """Equal ids for the strings as text, as contents, and for whole judging prompts."""
    for string in strings:
        plain = unicodedata.normalize("NFC", string.encode("utf-8", "replace").decode("utf-8"))
        _check_ids(one, one.encode(plain), other, other.encode(plain), "text", plain)
        contents = one.encoder.content_ids(string), other.encoder.content_ids(string)
        _check_ids(one, contents[0], other, contents[1], "content", string)
    for text in texts:
        _check_ids(one, _ids(one.encoder, text), other, _ids(other.encoder, text), "judging prompt of", text.response)


def _check_ids(one: _Side, ids: Sequence[int], other: _Side, others: Sequence[int], what: str, text: str) -> None:
    if ids == others:
        return
    at = _first_difference(ids, others)
    around = slice(max(0, at - 2), at + 4)
    raise ParityError(
        f"the {what} {_shown(text)} becomes {ids[around]} in {one.name} and {others[around]} in {other.name} (ids from "
        f"place {around.start} on): the judge would read other tokens than it was trained on; please report this with "
        "the name of the base model"
    )


def _first_difference(one: Sequence[Any], other: Sequence[Any]) -> int:
    """
    >>> _first_difference("abc", "abd"), _first_difference("ab", "abc")
    (2, 2)
    """
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _shown(text: str) -> str:
    return ascii(text) if len(text) <= 80 else f"{text[:80]!a}... ({len(text)} characters)"


def _check_lists(trainer: Any, file: GgufFile) -> None:
    """Every token, every merge and the end token of the file against the trainer's tokenizer."""
    tokens, merges = (file.metadata.get(f"tokenizer.ggml.{name}", []) for name in ("tokens", "merges"))
    for token, index in sorted(trainer.get_vocab().items(), key=lambda entry: entry[1]):
        found = tokens[index] if index < len(tokens) else None
        if found != token:
            raise ParityError(f"token {index} is {token!a} for the trainer and {found!a} in {file.path}")
    described = json.loads(trainer.backend_tokenizer.to_str())["model"]["merges"]
    wanted = [merge if isinstance(merge, str) else " ".join(merge) for merge in described]
    if wanted != merges:
        at = _first_difference(wanted, merges)
        one, other = (ascii(each[at]) if at < len(each) else "nothing" for each in (wanted, merges))
        raise ParityError(
            f"merge {at} is {one} for the trainer and {other} in {file.path}: texts would be split otherwise"
        )
    end = file.metadata.get("tokenizer.ggml.eos_token_id")
    if end != trainer.eos_token_id:
        raise ParityError(
            f"the end token is {trainer.eos_token_id} for the trainer and {end} in {file.path}: it would not stop"
        )


# --- template ---


def _template(trainer: Any) -> str | None:
    template = trainer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def _check_template_equal(trainer: Any, file: GgufFile) -> None:
    """The same text, and the same prompt from transformers and from llama-cpp-python."""
    template, found = _template(trainer), file.metadata.get("tokenizer.chat_template")
    if template != found:
        one, other = template or "", found or ""
        at = _first_difference(one, other)
        raise ParityError(
            f"the chat template in {file.path} is not the trained judge's: from character {at} on it has "
            f"{_shown(other[at : at + 40])} instead of {_shown(one[at : at + 40])}"
        )
    if template is None:
        return
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    formatter = Jinja2ChatFormatter(template, eos_token=trainer.eos_token or "", bos_token=trainer.bos_token or "")
    messages = [{"role": "user", "content": "<task>\nchat\n</task>\n "}]
    for thinking in (False, True):
        rendered = formatter(messages=messages, enable_thinking=thinking).prompt
        if rendered != _rendered(trainer, messages[0]["content"], thinking):
            raise ParityError(
                f"the chat template gives {rendered!a} in llama-cpp-python, and something else in transformers "
                f"(enable_thinking {thinking})"
            )


def _rendered(trainer: Any, turn: str, thinking: bool) -> str:
    messages = [{"role": "user", "content": turn}]
    return str(
        trainer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking)
    )


def _renders(trainer: Any, protocol: Protocol) -> bool:
    """Whether the chat template makes of one user turn what the protocol does."""
    turn = "<task>\nchat\n</task>"
    if trainer.chat_template is None:
        return False
    return _rendered(trainer, turn, protocol.thinking) == completion_prompt(protocol, turn)


# --- logits ---


def _layers(file: GgufFile, memory: float, work: Path) -> Sequence[int]:
    """All layers where memory and disk hold them, else the first two and the last."""
    every = range(layers_of(file))
    size = widened_bytes(file, every)
    home = next(folder for folder in (work, *work.resolve().parents) if folder.is_dir())
    if size <= memory / PARITY_SHARE and size < shutil.disk_usage(home).free:
        return every
    return sorted({0, min(1, every[-1]), every[-1]})


def _llama(path: Path, threads: int) -> LlamaCpp:
    return LlamaCpp.load(
        path, context=LONGEST, sequences=1, threads=threads, cache="f32", flash_attention=False, check=False
    )


def _places(texts: Sequence[Sequence[int]], longest: int) -> list[tuple[list[int], list[int]]]:
    """(ids, rows) of the texts that run through both models: a hard one, then the shortest real ones until there are
    `TOKENS`; and of all their positions `POSITIONS`, evenly spread."""
    hard, real = list(texts[: len(TASKS)]), sorted(texts[len(TASKS) :], key=len)
    taken: list[list[int]] = []
    for ids in [*hard[:1], *real, *hard[1:]]:
        if sum(map(len, taken)) >= TOKENS:
            break
        taken.append(list(ids[:longest]))
    every = [(number, row) for number, ids in enumerate(taken) for row in range(len(ids))]
    picked = {every[i * len(every) // POSITIONS] for i in range(POSITIONS)} if len(every) > POSITIONS else set(every)
    return [(ids, [row for row in range(len(ids)) if (number, row) in picked]) for number, ids in enumerate(taken)]


def _expected(
    merged: Path, file: GgufFile, layers: Sequence[int], places: list[tuple[list[int], list[int]]], threads: int
) -> tuple[np.ndarray, float]:
    """torch's logits [positions, V] with weights as the file's types hold them, and what rounding to these changes."""
    with _torch_threads(threads):
        model, rounded = _torch_model(merged, file, layers, rounding=True)
        expected = _torch_logits(model, places)
        del model
        if not rounded:
            return expected, 0.0
        model, _ = _torch_model(merged, file, layers, rounding=False)
        return expected, float(np.abs(_torch_logits(model, places) - expected).max())


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _torch_model(merged: Path, file: GgufFile, layers: Sequence[int], *, rounding: bool) -> tuple[Any, bool]:
    """The merged folder's model in f32 with these layers only, and whether rounding changed any weight."""
    import torch
    from transformers import AutoConfig, Qwen3ForCausalLM
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    config = AutoConfig.from_pretrained(merged, local_files_only=True, trust_remote_code=False)
    config.layer_types = [config.layer_types[layer] for layer in layers]
    config.num_hidden_layers = len(layers)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config)
    model.model.rotary_emb = Qwen3RotaryEmbedding(config)  # its frequencies are in no file
    folder, changed = TensorFolder(merged), False
    weights: dict[str, Any] = {}
    for name in model.state_dict():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            weights[name] = weights["model.embed_tokens.weight"]
            continue
        values = folder.f32(_in_folder(name, layers))
        if rounding:
            exact, values = values, _rounded(values, file.tensor(_in_file(_in_folder(name, layers))).type)
            changed = changed or not np.array_equal(exact, values)
        weights[name] = torch.from_numpy(values)
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    return model.eval().requires_grad_(False), changed


def _torch_logits(model: Any, places: list[tuple[list[int], list[int]]]) -> np.ndarray:
    import torch

    found = []
    with torch.no_grad():
        for ids, rows in places:
            answer = model(input_ids=torch.tensor([ids]), logits_to_keep=torch.tensor(rows), use_cache=False)
            found.append(answer.logits[0].numpy())
    return np.concatenate(found)


def _check_logits(
    expected: np.ndarray, found: np.ndarray, places: list[tuple[list[int], list[int]]]
) -> tuple[float, float]:
    """(largest difference, standard deviation of torch's logits)."""
    if expected.shape != found.shape:
        raise ParityError(f"torch gives {expected.shape[1]} logits a token, llama.cpp {found.shape[1]}")
    deviation = float(expected.std(dtype=np.float64))
    apart = np.abs(expected - found)
    difference, limit = float(apart.max()), TOLERANCE * deviation
    at = [(number, row) for number, (_, rows) in enumerate(places) for row in rows]
    if not difference <= limit:  # NaN is a difference
        worst, token = np.unravel_index(int(np.argmax(np.nan_to_num(apart, nan=np.inf))), apart.shape)
        raise ParityError(
            f"logits differ by up to {difference:.3g}, more than {TOLERANCE:g} of their standard deviation "
            f"({limit:.3g}): text {at[worst][0]}, position {at[worst][1]}, token {token}: {expected[worst, token]:.6g} "
            f"in torch, {found[worst, token]:.6g} in llama.cpp; the file does not hold this judge"
        )
    second, best = np.partition(expected, -2, axis=1)[:, -2:].T
    turned = (expected.argmax(axis=1) != found.argmax(axis=1)) & (best - second > 2 * limit)
    if turned.any():
        number, row = at[int(turned.argmax())]
        raise ParityError(
            f"the most likely token differs at position {row} of text {number}; the file does not hold this judge"
        )
    return difference, deviation


# --- weights of the layers that did not run ---


def _in_folder(name: str, layers: Sequence[int]) -> str:
    """The name in the folder of a weight of the model with these layers only."""
    parts = name.split(".")
    if parts[1] == "layers":
        parts[2] = str(layers[int(parts[2])])
    return ".".join(parts)


def _in_file(name: str) -> str:
    """
    >>> _in_file("model.layers.7.self_attn.q_proj.weight"), _in_file("lm_head.weight")
    ('blk.7.attn_q.weight', 'output.weight')
    """
    name = name.removesuffix(".weight")
    if name in _OTHER_TENSORS:
        return f"{_OTHER_TENSORS[name]}.weight"
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{_LAYER_TENSORS[rest]}.weight"


def _rounded(values: np.ndarray, kind: str) -> np.ndarray:
    """float32 values as a type of the file holds them, again as float32."""
    if kind == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    if kind == "BF16":
        return (bf16(np.ascontiguousarray(values)).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values


def _check_weights(merged: Path, file: GgufFile, layers: Sequence[int]) -> int:
    """Compare the weights of all other layers, value by value; returns how many tensors."""
    others = [layer for layer in range(layers_of(file)) if layer not in layers]
    folder = TensorFolder(merged)
    with file.path.open("rb") as opened:
        for layer in others:
            for part in _LAYER_TENSORS:
                name = f"model.layers.{layer}.{part}.weight"
                tensor = file.tensor(_in_file(name))
                same = folder.info(name).shape == tensor.shape[::-1] and all(
                    np.array_equal(_rounded(wanted, tensor.type), found)
                    for wanted, found in zip(folder.blocks(name), blocks(opened, tensor), strict=True)
                )
                if not same:
                    raise ParityError(f"tensor {tensor.name!r} of {file.path} does not hold the {name!r} of {merged}")
    return len(others) * len(_LAYER_TENSORS)
