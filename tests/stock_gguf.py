"""Somebody else's instruct models as little GGUF files of random weights: other architectures, vocabularies, templates.

Four of them, each in the manner of a family that people have at home:

- `llama3`: architecture llama, byte-level BPE, header tokens around roles, "10" one token, a token begins every text;
- `mistral`: architecture llama, SentencePiece with a space before every text, `[INST]` as plain text;
- `gemma`: architecture gemma2 with a sliding window of 64, SentencePiece without that space, line ends user-defined;
- `qwen2`: architecture qwen2, byte-level BPE, ChatML with a system prompt of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from random_qwen import byte_letters

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

HEADERS = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
INSTRUCTIONS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}"
    "{% else %}{{ raise_exception('no system here') }}{% endif %}{% endfor %}"
)
TURNS = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\\n' + m.content | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
CHATML = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

Tokens = list[tuple[str, int]]


def byte_level(*added: tuple[str, int]) -> dict[str, Any]:
    """A byte-level BPE vocabulary: the 256 bytes, a few merges (one makes "10"), and special tokens."""
    merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("1", "0"), ("s", "c"), (")", "Ċ"), (">", "Ċ"), ("<", "/")]
    tokens = [*byte_letters(), *("".join(merge) for merge in merges)]
    listed = [*((token, NORMAL) for token in tokens), *added]
    return {"model": "gpt2", "tokens": listed, "merges": [" ".join(merge) for merge in merges]}


PIECES = (
    "▁t he ▁the ▁a re in on </ score eval <s </s <0 <0x <0x3 <0x3C <u <un <unk <b <bo <bos ru br ic ▁( ): )▁ zq"
).split()
"""Pieces of several characters. From some of them ordinary tokenizing forms special tokens and byte tokens: `<s` and
`>` make `<s>`. `zq` is marked unused."""


def sentencepiece(first: Tokens, *added: tuple[str, int]) -> dict[str, Any]:
    """A SentencePiece vocabulary: special tokens, 256 bytes, printable ASCII, some pieces, the likeliest first."""
    letters = ["▁", *(chr(code) for code in range(33, 127))]
    bytes_ = [(f"<0x{byte:02X}>", BYTE) for byte in range(256)]
    pieces = [(piece, UNUSED if piece == "zq" else NORMAL) for piece in (*PIECES, *letters)]
    return {"model": "llama", "tokens": [*first, *bytes_, *pieces, *added]}


def vocabulary(name: str) -> dict[str, Any]:
    """Tokens and settings of a vocabulary: what `write` takes."""
    if name == "llama3":
        added = "<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eom_id|> <|eot_id|>".split()
        found = byte_level(*((token, CONTROL) for token in added), ("<tool>", USER_DEFINED))
        return {**found, "pre": "llama-bpe", "bos": "<|begin_of_text|>", "eos": "<|eot_id|>", "template": HEADERS}
    if name == "qwen2":
        added = [(token, CONTROL) for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
        found = byte_level(*added, ("[PAD300]", USER_DEFINED), (">>TITLE<<", USER_DEFINED))
        return {**found, "pre": "qwen2", "bos": None, "eos": "<|im_end|>", "template": CHATML, "add_bos": False}
    if name == "mistral":
        found = sentencepiece([("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL)], ("[TOOL]", USER_DEFINED))
        return {**found, "bos": "<s>", "eos": "</s>", "template": INSTRUCTIONS, "add_bos": True}
    first = [("<pad>", CONTROL), ("<eos>", CONTROL), ("<bos>", CONTROL), ("<unk>", UNKNOWN)]
    turns = [("<start_of_turn>", CONTROL), ("<end_of_turn>", CONTROL), ("<unused0>", UNUSED)]
    spaces = [(space, USER_DEFINED) for space in ("\n", "\n\n", "  ", "<h1>")]
    found = sentencepiece(first, *turns, *spaces)
    more = {"add_bos": True, "add_space_prefix": False, "template": TURNS}
    return {**found, "bos": "<bos>", "eos": "<eos>", **more}


HIDDEN, MLP, LAYERS = 32, 64, 2
ARCHITECTURES = {"llama3": "llama", "mistral": "llama", "gemma": "gemma2", "qwen2": "qwen2"}


def write_stock(
    path: Path, name: str, seed: int = 0, weights: dict[str, np.ndarray] | None = None, **changes: Any
) -> Path:
    """A little model of that name. `weights`: by name, in place of the random ones or beside them. `changes`: to its
    vocabulary's settings (a value None leaves a key out), and `architecture`, `fields` (further metadata)."""
    settings = {"architecture": ARCHITECTURES[name], "fields": {}, **vocabulary(name), **changes}
    architecture, tokens = settings["architecture"], settings["tokens"]
    writer = gguf.GGUFWriter(None, architecture)
    hidden, heads, size, mlp, layers = HIDDEN, 2, 16, MLP, LAYERS
    numbers = {
        "context_length": 8192,
        "embedding_length": hidden,
        "block_count": layers,
        "feed_forward_length": mlp,
        "attention.head_count": heads,
        "attention.head_count_kv": 1,
        "attention.key_length": size,
        "attention.value_length": size,
        "rope.dimension_count": size,
    }
    if architecture == "gemma2":
        numbers["attention.sliding_window"] = 64
        writer.add_float32("gemma2.attn_logit_softcapping", 50.0)
        writer.add_float32("gemma2.final_logit_softcapping", 30.0)
    for key, number in numbers.items():
        writer.add_uint32(f"{architecture}.{key}", number)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_tokenizer_model(settings["model"])
    writer.add_token_list([token for token, _ in tokens])
    writer.add_token_types([kind for _, kind in tokens])
    if settings["model"] == "llama":
        writer.add_token_scores([-float(number) for number in range(len(tokens))])
    else:
        writer.add_tokenizer_pre(settings["pre"])
        writer.add_token_merges(settings["merges"])
    spellings = [token for token, _ in tokens]
    if settings["bos"] is not None:
        writer.add_bos_token_id(spellings.index(settings["bos"]))
    if settings["eos"] is not None:
        writer.add_eos_token_id(spellings.index(settings["eos"]))
    if settings.get("add_bos") is not None:
        writer.add_add_bos_token(settings["add_bos"])
    if settings.get("add_space_prefix") is not None:
        writer.add_add_space_prefix(settings["add_space_prefix"])
    if settings["template"] is not None:
        writer.add_chat_template(settings["template"])
    for key, value in settings["fields"].items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)
    _add_weights(writer, architecture, len(tokens), hidden, heads * size, size, mlp, layers, seed, weights or {})
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_answering(path: Path, reply: str) -> Path:
    """A model that answers everything with the same words, in the manner of `llama3`: its layers add nothing, the words
    are one token, every other token is followed by it, and it by the end."""
    known = vocabulary("llama3")
    letters = byte_letters()
    tokens = [*known["tokens"], ("".join(letters[byte] for byte in reply.encode()), NORMAL)]
    end, said = [token for token, _ in tokens].index("<|eot_id|>"), len(tokens) - 1
    embedded, head = np.zeros((len(tokens), HIDDEN), np.float32), np.zeros((len(tokens), HIDDEN), np.float32)
    embedded[:, 0], embedded[said], embedded[said, 1] = 1, 0, 1
    head[said, 0] = head[end, 1] = 1
    nothing = {
        f"blk.{layer}.{part}": np.zeros((HIDDEN, width), np.float32)
        for layer in range(LAYERS)
        for part, width in (("attn_output", HIDDEN), ("ffn_down", MLP))
    }
    weights = {"token_embd": embedded, "output": head, **nothing}
    return write_stock(path, "llama3", weights=weights, tokens=tokens)


def _add_weights(
    writer: Any,
    architecture: str,
    vocab: int,
    hidden: int,
    queries: int,
    keys: int,
    mlp: int,
    layers: int,
    seed: int,
    given: dict[str, np.ndarray],
) -> None:
    """Weights that give logits of a spread near 2, as in `little_gguf`."""
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (vocab, hidden), "output_norm": (hidden,)}
    norms = ["attn_norm", "ffn_norm"]
    if architecture == "gemma2":
        norms += ["post_attention_norm", "post_ffw_norm"]
    for layer in range(layers):
        at = f"blk.{layer}."
        shapes |= {at + "attn_q": (queries, hidden), at + "attn_k": (keys, hidden), at + "attn_v": (keys, hidden)}
        shapes |= {at + "attn_output": (hidden, queries), at + "ffn_gate": (mlp, hidden), at + "ffn_up": (mlp, hidden)}
        shapes |= {at + "ffn_down": (hidden, mlp), **{at + norm: (hidden,) for norm in norms}}
    random = np.random.default_rng(seed)
    for name, shape in shapes.items():
        values = 1 + random.normal(0, 0.1, shape) if len(shape) == 1 else random.normal(0, 0.35, shape)
        writer.add_tensor(f"{name}.weight", given.get(name, values).astype(np.float32))
    for name in given.keys() - shapes.keys():
        writer.add_tensor(f"{name}.weight", given[name].astype(np.float32))
