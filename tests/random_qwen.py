"""A random dense Qwen3 as a Hugging Face folder, written without torch; its vocabulary is the 256 bytes and some words.

`logits` computes such a model in float64 with numpy: an oracle that shares no code with transformers or llama.cpp.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from patarm_lite.quantize.tensors import Entry, TensorFolder, write_sharded

MERGES = [("Ġ", "t"), ("h", "e"), ("Ġt", "he")]
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
USER_DEFINED = ("<|fim_prefix|>", "<think>")
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ROWS = 272


def byte_letters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary (the rule of GPT-2's tokenizer)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(rest)) for byte in range(256)]


def tokenizer() -> dict[str, Any]:
    """A tokenizer.json: ids 0 to 255 the bytes, then 3 merged words, 3 control tokens, 2 user-defined ones."""
    tokens = [*byte_letters(), *("".join(merge) for merge in MERGES)]
    rules = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": len(tokens) + number, "content": content, **rules, "special": content in CONTROL}
        for number, content in enumerate((*CONTROL, *USER_DEFINED))
    ]
    split = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {token: id_ for id_, token in enumerate(tokens)},
            "merges": [list(merge) for merge in MERGES],
        },
    }


def config(tied: bool = True, **changes: Any) -> dict[str, Any]:
    """A config.json: heads times head size is not the hidden size, and two heads share a key."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 259,
        "eos_token_id": 261,
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": 32,
        "intermediate_size": 64,
        "max_position_embeddings": 512,
        "max_window_layers": 3,
        "model_type": "qwen3",
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "tie_word_embeddings": tied,
        "use_sliding_window": False,
        "vocab_size": ROWS,
        **changes,
    }


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors of such a model."""
    hidden, mlp, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        found |= {
            f"model.layers.{layer}.{part}.weight": shape
            for part, shape in {
                "input_layernorm": (hidden,),
                "self_attn.q_proj": (queries, hidden),
                "self_attn.k_proj": (keys, hidden),
                "self_attn.v_proj": (keys, hidden),
                "self_attn.q_norm": (size,),
                "self_attn.k_norm": (size,),
                "self_attn.o_proj": (hidden, queries),
                "post_attention_layernorm": (hidden,),
                "mlp.gate_proj": (mlp, hidden),
                "mlp.up_proj": (mlp, hidden),
                "mlp.down_proj": (hidden, mlp),
            }.items()
        }
    found["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (config["vocab_size"], hidden)
    return found


def write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")


def write_model(
    folder: Path,
    *,
    tied: bool = True,
    dtype: str = "F32",
    seed: int = 0,
    changes: dict[str, Any] | None = None,
    replaced: dict[str, np.ndarray] | None = None,
    with_tokenizer: bool = True,
    shard_bytes: int = 4_000_000_000,
) -> Path:
    """Write such a model into a folder and return it.

    Args:
        dtype: F32, F16 or BF16.
        changes: to config.json.
        replaced: tensors by name that take the place of random ones (F32), or come on top.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = config(tied, **(changes or {}))
    write_json(folder / "config.json", settings)
    if with_tokenizer:
        write_json(folder / "tokenizer.json", tokenizer())
        write_json(folder / "tokenizer_config.json", {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})
        (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    random = np.random.default_rng(seed)

    def make(shape: tuple[int, ...]) -> np.ndarray:
        values = random.standard_normal(shape, np.float32)
        values *= np.float32(0.1 if len(shape) == 1 else shape[-1] ** -0.5)
        if len(shape) == 1:
            values += np.float32(1)
        if dtype == "BF16":
            return (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
        return values.astype(np.float16) if dtype == "F16" else values

    def entry(name: str, shape: tuple[int, ...]) -> Entry:
        given = (replaced or {}).get(name)
        if given is not None:
            return Entry(name, "F32", given.shape, lambda: given.astype(np.float32))
        return Entry(name, dtype, shape, lambda: make(shape))

    found = shapes(settings) | {name: array.shape for name, array in (replaced or {}).items()}
    write_sharded(folder, [entry(name, shape) for name, shape in found.items()], shard_bytes)
    return folder


def logits(folder: Path, ids: list[int], weights: dict[str, np.ndarray] | None = None) -> np.ndarray:
    """What a folder's model answers to each prefix of `ids`: [len(ids), vocabulary], in float64.

    Qwen3's technical report, section 2: grouped queries, an RMS norm on each head's query and key, SwiGLU, rotary
    positions with the two halves of a head as pairs. `weights`: in place of the folder's.
    """
    settings = json.loads((folder / "config.json").read_text())
    tensors = TensorFolder(folder)
    found = {name: tensors.f32(name).astype(np.float64) for name in tensors.names()}
    found |= {name: array.astype(np.float64) for name, array in (weights or {}).items()}
    heads, groups, size = settings["num_attention_heads"], settings["num_key_value_heads"], settings["head_dim"]
    angles = np.outer(np.arange(len(ids)), settings["rope_theta"] ** (-np.arange(0, size, 2) / size))[:, None, :]
    mask = np.triu(np.full((len(ids), len(ids)), -np.inf), 1)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + settings["rms_norm_eps"]) * found[name + ".weight"]

    def turned(x: np.ndarray) -> np.ndarray:
        first, second = x[..., : size // 2], x[..., size // 2 :]
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

    x = found["model.embed_tokens.weight"][ids]
    for layer in range(settings["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        h = norm(x, at + "input_layernorm")
        q, k, v = ((h @ found[f"{at}self_attn.{part}_proj.weight"].T).reshape(len(ids), -1, size) for part in "qkv")
        q, k = turned(norm(q, at + "self_attn.q_norm")), turned(norm(k, at + "self_attn.k_norm"))
        k, v = (np.repeat(part, heads // groups, axis=1) for part in (k, v))
        scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(size) + mask
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        x = x + np.einsum("hij,jhd->ihd", scores, v).reshape(len(ids), -1) @ found[at + "self_attn.o_proj.weight"].T
        h = norm(x, at + "post_attention_layernorm")
        gate = h @ found[at + "mlp.gate_proj.weight"].T
        up = h @ found[at + "mlp.up_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ found[at + "mlp.down_proj.weight"].T
    head = found["model.embed_tokens.weight" if settings["tie_word_embeddings"] else "lm_head.weight"]
    return norm(x, "model.norm") @ head.T
