"""A random judge with the arena's vocabulary as a GGUF file: it writes nonsense, but through the real llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 64,
    "max_position_embeddings": 2048,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def write_little_gguf(folder: Path, seed: int = 0, dtype: str = "f16", **changes: Any) -> Path:
    """`little.gguf` in a folder, with weights that give logits of a spread near 2."""
    from conftest import little_tokenizer

    from patarm_lite.quantize.convert import convert
    from patarm_lite.quantize.tensors import Entry, write_tensors

    tokenizer = little_tokenizer()
    config = {**CONFIG, "vocab_size": len(tokenizer), **changes}
    hf = folder / "hf"
    tokenizer.save_pretrained(hf)
    (hf / "config.json").write_text(json.dumps(config), encoding="utf-8")
    rng = np.random.default_rng(seed)
    hidden, mlp, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        shapes |= {
            name + "self_attn.q_proj.weight": (queries, hidden),
            name + "self_attn.k_proj.weight": (keys, hidden),
            name + "self_attn.v_proj.weight": (keys, hidden),
            name + "self_attn.o_proj.weight": (hidden, queries),
            name + "self_attn.q_norm.weight": (size,),
            name + "self_attn.k_norm.weight": (size,),
            name + "mlp.gate_proj.weight": (mlp, hidden),
            name + "mlp.up_proj.weight": (mlp, hidden),
            name + "mlp.down_proj.weight": (hidden, mlp),
            name + "input_layernorm.weight": (hidden,),
            name + "post_attention_layernorm.weight": (hidden,),
        }
    shapes["model.norm.weight"] = (hidden,)

    def weights(shape: tuple[int, ...]) -> bytes:
        values = 1 + rng.normal(0, 0.1, shape) if len(shape) == 1 else rng.normal(0, 0.35, shape)
        return values.astype("<f4").tobytes()

    entries = [Entry(name, "F32", shape, lambda shape=shape: weights(shape)) for name, shape in shapes.items()]
    write_tensors(hf / "model.safetensors", entries)
    return convert(hf, folder / "little.gguf", dtype=dtype).path
