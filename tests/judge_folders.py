"""Folders of little judges written by hand, without torch: bases, adapters, run folders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from conftest import little_recipe

from patarm_lite.quantize.tensors import Entry, write_sharded, write_tensors

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def base_shapes(layers: int, hidden: int, mlp: int, vocab: int, tied: bool) -> dict[str, tuple[int, ...]]:
    """Tensors of a Qwen3 of two heads of 32 and one key-value head."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not tied:
        shapes["lm_head.weight"] = (vocab, hidden)
    for layer in range(layers):
        attention = {"q_proj": (64, hidden), "k_proj": (32, hidden), "v_proj": (32, hidden), "o_proj": (hidden, 64)}
        feed_forward = {"gate_proj": (mlp, hidden), "up_proj": (mlp, hidden), "down_proj": (hidden, mlp)}
        for part, sizes in (("self_attn", attention), ("mlp", feed_forward)):
            shapes |= {f"model.layers.{layer}.{part}.{name}.weight": shape for name, shape in sizes.items()}
        shapes |= {f"model.layers.{layer}.self_attn.{name}_norm.weight": (32,) for name in "qk"}
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{name}.weight"] = (hidden,)
    return shapes


def write_base(
    folder: Path,
    *,
    layers: int = 2,
    hidden: int = 32,
    mlp: int = 64,
    vocab: int = 40,
    tied: bool = True,
    dtype: str = "F32",
    seed: int = 0,
    shard_bytes: int = 1 << 40,
    values: dict[str, np.ndarray] | None = None,
    **config: Any,
) -> Path:
    """A base with random weights (`values` replaces some) and a tokenizer of single letters. bf16: cut, not rounded."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    entries = []
    for name, shape in base_shapes(layers, hidden, mlp, vocab, tied).items():
        found = random.standard_normal(shape, np.float32) / 4
        if values is not None and name in values:
            found = values[name].astype(np.float32).reshape(shape)
        if dtype == "BF16":
            found = (found.view(np.uint32) >> 16).astype(np.uint16)
        elif dtype == "F16":
            found = found.astype(np.float16)
        entries.append(Entry(name, dtype, shape, lambda found=found: found))
    write_sharded(folder, entries, shard_bytes)
    described = {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "dtype": {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}[dtype],
        "eos_token_id": 1,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "max_position_embeddings": 512,
        "model_type": "qwen3",
        "num_attention_heads": 2,
        "num_hidden_layers": layers,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "sliding_window": None,
        "tie_word_embeddings": tied,
        "use_sliding_window": False,
        "vocab_size": vocab,
        **config,
    }
    write(folder / "config.json", described)
    write(folder / "generation_config.json", {"eos_token_id": 1, "temperature": 0.6, "top_k": 20})
    write_tokenizer(folder, vocab)
    return folder


def write_tokenizer(folder: Path, vocab: int) -> None:
    """A tokenizer whose largest id is `vocab - 1`."""
    letters = {chr(0x61 + number): number for number in range(vocab - 1)}
    model = {"type": "BPE", "vocab": letters, "merges": []}
    added = [{"id": vocab - 1, "content": "<|im_end|>", "special": True}]
    write(folder / "tokenizer.json", {"version": "1.0", "added_tokens": added, "model": model})
    write(folder / "tokenizer_config.json", {"eos_token": "<|im_end|>"})


def write_adapter(
    folder: Path,
    base: Path | str,
    shapes: dict[str, tuple[int, ...]],
    *,
    rank: int = 4,
    targets: Sequence[str] = LINEAR,
    seed: int = 1,
    extra: dict[str, tuple[int, ...]] | None = None,
    **config: Any,
) -> Path:
    """A LoRA adapter on the `targets` among `shapes`; `extra`: further tensors by full name."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    sizes: dict[str, tuple[int, ...]] = dict(extra or {})
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if module.endswith(tuple(targets)):
            sizes[f"base_model.model.{module}.lora_A.weight"] = (rank, shape[1])
            sizes[f"base_model.model.{module}.lora_B.weight"] = (shape[0], rank)
    entries = [
        Entry(name, "F32", shape, lambda shape=shape: random.standard_normal(shape, np.float32))
        for name, shape in sorted(sizes.items())
    ]
    write_tensors(folder / "adapter_model.safetensors", entries)
    described = {
        "base_model_name_or_path": str(base),
        "bias": "none",
        "init_lora_weights": True,
        "lora_alpha": 8,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": list(targets),
        "task_type": "CAUSAL_LM",
        **config,
    }
    write(folder / "adapter_config.json", described)
    return folder


def write_protocol(folder: Path, rubric: str = "arena") -> None:
    write(
        folder / "protocol.json",
        {"protocol": "patarm-lite/1", "instructions": False, "thinking": False, "rubric": rubric},
    )


def write_run(folder: Path, judge: Path, about: dict[str, Any] | None = None, **recipe: Any) -> Path:
    """A finished run folder around a judge's folder, which moves into it."""
    folder.mkdir(parents=True)
    write_protocol(judge)
    judge.rename(folder / "judge")
    known = {
        "schema": 1,
        "status": "done",
        "parameters": 12345,
        "data": {"train": 13, "heldout": 10, "sha256_train": "aa", "sha256_heldout": "bb", "dropped": {}},
        "versions": {"patarm-lite": "0.1.0", "torch": "2.13.0"},
        "command": "patarm-lite train /home/somebody/a.yaml",
        **(about or {}),
    }
    write(folder / "run.json", known)
    data = little_recipe(**recipe).model_dump(mode="json")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    return folder


def write(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data), encoding="utf-8")


def change(path: Path, **keys: Any) -> None:
    """Change keys of a JSON file; a key given as None goes."""
    data = {**json.loads(path.read_text(encoding="utf-8")), **keys}
    write(path, {key: value for key, value in data.items() if value is not None})
