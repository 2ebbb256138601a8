"""A Hugging Face folder of a dense Qwen3, or a LoRA adapter for one, as a GGUF file. Streams; needs no torch.

    convert(Path("runs/judge/judge"), Path("judge-f16.gguf"))
    convert_adapter(Path("adapter"), Path("Qwen3-8B"), Path("adapter.gguf"))

Peak memory does not grow with the model: weights are read, checked and written some megabytes at a time. Names, types,
bytes and metadata are those of llama.cpp's own converter, with which a test compares them. Left out on purpose: what is
no dense Qwen3. What llama.cpp would take and run wrongly (sliding windows, attention biases, most kinds of rope
scaling, NaN weights) is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from patarm_lite.errors import UserError
from patarm_lite.quantize.adapter import CONFIG_FILE, Adapter, check_fits, read_adapter
from patarm_lite.quantize.tensors import TensorFolder, replacing
from patarm_lite.quantize.vocabulary import PRE_TOKENIZER, Vocabulary, read_json, read_vocabulary

ARCHITECTURE = "qwen3"
FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32}
"""What `dtype` may be, and its number in `general.file_type`."""
LARGEST_F16 = 65_504.0

_SAMPLING = {
    "top_k": ("top_k", "INT32"),
    "top_p": ("top_p", "FLOAT32"),
    "min_p": ("min_p", "FLOAT32"),
    "temperature": ("temp", "FLOAT32"),
    "repetition_penalty": ("penalty_repeat", "FLOAT32"),
}
"""Keys of generation_config.json that a GGUF file carries -> name behind `general.sampling.` and kind."""

Fields = dict[str, tuple[Any, str]]
"""Metadata of a GGUF file: key -> value and kind (`STRING`, `UINT32`, ..., `ARRAY:STRING`)."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The numbers of a dense Qwen3. `rope_scaling`: none, or `factor`, `original_max_position_embeddings` and, if
    they are given, `beta_fast` and `beta_slow` of YaRN."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    tied: bool
    context: int
    rope_theta: float
    rms_eps: float
    rope_scaling: dict[str, float] | None


@dataclass(frozen=True, slots=True)
class Converted:
    """A written GGUF file: how many tensors and parameters it has, and its size in bytes."""

    path: Path
    tensors: int
    parameters: int
    bytes: int


@dataclass(frozen=True, slots=True)
class _Weight:
    """A tensor to be written: its name in the GGUF file, in the folder, its shape and what it becomes.

    `factor`: all its values are multiplied by this.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    dtype: str
    factor: float = 1.0

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * (4 if self.dtype == "f32" else 2)


def shape_of(folder: Path, *, quantized_too: bool = False) -> ModelShape:
    """The shape of a model from its config.json.

    Args:
        quantized_too: also of a folder whose weights are quantized and can't be converted.

    Raises:
        UserError: no config.json, no dense Qwen3, or a variant of it that llama.cpp would run wrongly.
    """
    path = folder / "config.json"
    config = read_json(path)
    _check_dense_qwen3(path, config)
    if not quantized_too:
        _check_not_quantized(path, config)

    def number(key: str, default: int | None = None) -> int:
        value = config.get(key)
        value = default if value is None else value
        if type(value) is not int or value < 1:
            raise UserError(f"{path} has {key} {value!r}, which must be a positive whole number")
        return value

    heads = number("num_attention_heads")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path} has rope parameters {rope!r}, which must be an object")
    # 128 and 10000: what transformers takes where the file says nothing
    theta = rope.get("rope_theta", config.get("rope_theta", 10_000.0))
    shape = ModelShape(
        layers=number("num_hidden_layers"),
        hidden=number("hidden_size"),
        heads=heads,
        kv_heads=number("num_key_value_heads", heads),
        head_dim=number("head_dim", 128),
        mlp=number("intermediate_size"),
        vocab=number("vocab_size"),
        tied=bool(config.get("tie_word_embeddings", False)),
        context=number("max_position_embeddings"),
        rope_theta=_positive(path, "rope_theta", theta),
        rms_eps=_positive(path, "rms_norm_eps", config.get("rms_norm_eps", 1e-6)),
        rope_scaling=_rope_scaling(path, config, rope),
    )
    if shape.heads % shape.kv_heads:
        raise UserError(f"{path} has {shape.heads} attention heads for {shape.kv_heads} key-value heads; no multiple")
    return shape


def _positive(path: Path, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(f"{path} has {key} {value!r}, which must be a positive number")
    return float(value)


def _check_dense_qwen3(path: Path, config: dict[str, Any]) -> None:
    kind = config.get("model_type")
    if kind != "qwen3":
        raise UserError(f"{path} has model_type {kind!r}; only dense Qwen3 models ('qwen3') can be exported")
    classes = config.get("architectures") or ["Qwen3ForCausalLM"]
    if classes != ["Qwen3ForCausalLM"]:
        raise UserError(
            f"{path} is of the class {', '.join(map(str, classes))}; a judge writes text, so give a Qwen3ForCausalLM"
        )
    sliding = "sliding_attention" in (config.get("layer_types") or [])
    found = {
        "attention_bias": config.get("attention_bias"),
        "use_sliding_window": config.get("use_sliding_window"),
        "layer_types": "sliding_attention" if sliding else None,
        "hidden_act": None if config.get("hidden_act", "silu") == "silu" else config["hidden_act"],
    }
    for key, value in found.items():
        if value:
            raise UserError(
                f"{path} has {key} {value!r}, which llama.cpp's Qwen3 does not compute; it can't be exported"
            )


def _check_not_quantized(path: Path, config: dict[str, Any]) -> None:
    quantized = config.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise UserError(
            f"{path} describes weights quantized by {method!r}; give the 16-bit original, or merge it first"
        )


def _rope_scaling(path: Path, config: dict[str, Any], rope: dict[str, Any]) -> dict[str, float] | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if (rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UserError(f"{path} rotates a part of each head only (partial_rotary_factor), which no Qwen3 does")
    if kind == "default":
        return None
    if kind != "yarn":
        raise UserError(f"{path} has rope scaling of type {kind!r}; 'yarn' and 'default' can be exported")
    factor = _positive(path, "rope factor", rope.get("factor"))
    # llama.cpp computes the attention factor from the factor, and always rounds the correction range
    usual = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    attention = rope.get("attention_factor")
    unusual = [key for key in ("mscale", "mscale_all_dim", "extrapolation_factor") if rope.get(key) is not None]
    unusual += ["attention_factor"] if attention is not None and abs(attention - usual) > 1e-6 else []
    unusual += ["truncate"] if rope.get("truncate", True) is not True else []
    if unusual:
        value = rope[unusual[0]]
        raise UserError(f"{path} has yarn scaling with {unusual[0]} {value!r}, which llama.cpp does not compute")
    keys = ["original_max_position_embeddings", *(key for key in ("beta_fast", "beta_slow") if rope.get(key))]
    return {"factor": factor} | {key: _positive(path, key, rope.get(key)) for key in keys}


def convert(
    folder: Path,
    out: Path,
    *,
    dtype: str = "f16",
    metadata: Mapping[str, Any] | None = None,
    layers: Sequence[int] | None = None,
    name: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Converted:
    """Write a model as one GGUF file. The file appears by rename; after an error nothing is left.

    Args:
        folder: config.json, tokenizer files and 16-bit or 32-bit safetensors of a dense Qwen3.
        out: where the file goes; it is replaced.
        dtype: `f16`, `f32` or `bf16`, for the matrices; norms are f32 always.
        metadata: further keys (str, int, float, bool, list of str); they win over our own of the same name.
        layers: keep only these, in this order, numbered anew; none: all.
        name: `general.name`; none: the folder's name.
        progress: called with bytes written so far and in all.

    Raises:
        UserError: not a dense Qwen3, a tensor is missing, has another shape or holds NaN, infinity or (f16) values
            beyond 65504, or a tokenizer that llama.cpp would not imitate.
    """
    if dtype not in FILE_TYPES:
        raise UserError(f"type {dtype!r} is not among {', '.join(FILE_TYPES)}")
    shape = shape_of(folder)
    tensors = TensorFolder(folder)
    shapes = _shapes(shape)
    _check_tensors(tensors, shapes, shape.tied)
    weights = [
        _Weight(name, source, shapes[source], dtype if len(shapes[source]) > 1 else "f32")
        for source, name in _gguf_names(shape, layers).items()
    ]
    fields = _general_fields(folder, "model", name)
    fields["general.size_label"] = _size_label(sum(math.prod(weight.shape) for weight in weights)), "STRING"
    fields |= _shape_fields(shape, shape.layers if layers is None else len(layers))
    fields["general.file_type"] = FILE_TYPES[dtype], "UINT32"
    fields |= _vocabulary_fields(read_vocabulary(folder, shape.vocab))
    fields |= {key: _field(value) for key, value in (metadata or {}).items()}
    return _write(out, fields, tensors, weights, progress)


def convert_adapter(adapter_folder: Path, base_folder: Path, out: Path) -> Converted:
    """Write a PEFT LoRA adapter as a GGUF LoRA (f32), which llama.cpp puts onto the base model in any quantization.

    llama.cpp scales every pair of matrices by alpha / rank with one alpha for the file; where PEFT scales otherwise
    (rsLoRA, ranks or alphas by pattern), the rest of the factor goes into the B matrix.

    Args:
        adapter_folder: adapter_config.json and adapter_model.safetensors.
        base_folder: the base model's config.json; its weights are not read.

    Raises:
        UserError: not a plain LoRA on attention and MLP matrices (and an untied head), or one of another base model.
    """
    shape = shape_of(base_folder, quantized_too=True)
    adapter = read_adapter(adapter_folder)
    check_fits(adapter, str(base_folder), _shapes(shape), shape.tied)
    alpha = _positive(adapter_folder / CONFIG_FILE, "lora_alpha", adapter.config["lora_alpha"])
    weights = _adapter_weights(adapter, shape, alpha)
    fields = _general_fields(adapter_folder, "adapter", None)
    fields["adapter.type"] = "lora", "STRING"
    fields["adapter.lora.alpha"] = alpha, "FLOAT32"
    return _write(out, fields, adapter.tensors, weights, None)


_EMBEDDING = "model.embed_tokens.weight"
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Tensors of a layer: name in the folder -> name in the GGUF file."""


def _gguf_names(shape: ModelShape, layers: Sequence[int] | None = None) -> dict[str, str]:
    """Name in the folder -> name in the GGUF file, in the file's order."""
    kept = {
        f"model.layers.{layer}.{part}.weight": f"blk.{number}.{name}.weight"
        for number, layer in enumerate(range(shape.layers) if layers is None else layers)
        for part, name in _LAYER.items()
    }
    head = {} if shape.tied else {"lm_head.weight": "output.weight"}
    return {_EMBEDDING: "token_embd.weight", **kept, "model.norm.weight": "output_norm.weight", **head}


def _shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """The tensors of a model: name in the folder -> rows and row length, or length."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    layer = {
        "input_layernorm": (shape.hidden,),
        "self_attn.q_proj": (queries, shape.hidden),
        "self_attn.k_proj": (keys, shape.hidden),
        "self_attn.v_proj": (keys, shape.hidden),
        "self_attn.q_norm": (shape.head_dim,),
        "self_attn.k_norm": (shape.head_dim,),
        "self_attn.o_proj": (shape.hidden, queries),
        "post_attention_layernorm": (shape.hidden,),
        "mlp.gate_proj": (shape.mlp, shape.hidden),
        "mlp.up_proj": (shape.mlp, shape.hidden),
        "mlp.down_proj": (shape.hidden, shape.mlp),
    }
    inner: dict[str, tuple[int, ...]] = {
        f"model.layers.{number}.{part}.weight": found for number in range(shape.layers) for part, found in layer.items()
    }
    embedding = (shape.vocab, shape.hidden)
    head = {} if shape.tied else {"lm_head.weight": embedding}
    return {_EMBEDDING: embedding, **inner, "model.norm.weight": (shape.hidden,), **head}


def _check_tensors(tensors: TensorFolder, wanted: Mapping[str, tuple[int, ...]], tied: bool) -> None:
    for name, shape in wanted.items():
        found = tensors.info(name).shape
        if found != shape:
            raise UserError(
                f"tensor {name!r} in {tensors.folder} has shape {list(found)}, and config.json implies {list(shape)}; "
                "is the config.json of another model?"
            )
    spare = [name for name in tensors.names() if name not in wanted and not name.endswith("rotary_emb.inv_freq")]
    if tied and "lm_head.weight" in spare:
        spare.remove("lm_head.weight")
        _check_head_is_embedding(tensors)
    if spare:
        raise UserError(
            f"{tensors.folder} holds {spare[0]!r}{' and others' if len(spare) > 1 else ''}, which a dense Qwen3 "
            "does not have; if it is an adapter's folder, merge it first"
        )


def _check_head_is_embedding(tensors: TensorFolder) -> None:
    pairs = zip(tensors.blocks(_EMBEDDING), tensors.blocks("lm_head.weight"), strict=True)
    same = tensors.info("lm_head.weight").shape == tensors.info(_EMBEDDING).shape
    if not same or not all(np.array_equal(first, second, equal_nan=True) for first, second in pairs):
        raise UserError(
            f"{tensors.folder} has tied embeddings by its config.json, and a 'lm_head.weight' that differs from them; "
            "set tie_word_embeddings to false if the head was trained"
        )


def _adapter_weights(adapter: Adapter, shape: ModelShape, alpha: float) -> list[_Weight]:
    names = _gguf_names(shape)
    matrices = [name for name, found in _shapes(shape).items() if len(found) > 1 and name != _EMBEDDING]
    foreign = sorted(adapter.touched - set(matrices)) + sorted(adapter.replaced)
    if foreign:
        raise UserError(
            f"the adapter {adapter.folder} changes {foreign[0]!r}, which a GGUF LoRA can't hold "
            f"({'a whole trained tensor' if foreign[0] in adapter.replaced else 'an embedding or norm'}); "
            "export the merged model instead"
        )
    weights: list[_Weight] = []
    for name in matrices:
        change = adapter.changes.get(name)
        if change is not None:
            a, b = (adapter.tensors.info(factor).shape for factor in (change.a, change.b))
            weights.append(_Weight(f"{names[name]}.lora_a", change.a, a, "f32"))
            weights.append(_Weight(f"{names[name]}.lora_b", change.b, b, "f32", change.scale * a[0] / alpha))
    return weights


def _general_fields(folder: Path, kind: str, name: str | None) -> Fields:
    import gguf

    fields: Fields = {"general.architecture": (ARCHITECTURE, "STRING"), "general.type": (kind, "STRING")}
    generation = read_json(folder / "generation_config.json", missing_ok=True) if kind == "model" else {}
    for key, (short, form) in _SAMPLING.items():
        if generation.get(key) is not None:
            fields[f"general.sampling.{short}"] = generation[key], form
    fields["general.name"] = name or folder.resolve().name, "STRING"
    fields["general.quantization_version"] = gguf.GGML_QUANT_VERSION, "UINT32"
    return fields


def _size_label(parameters: int) -> str:
    """`298K`, `1.7B`, as file names of GGUF files have it."""
    import gguf

    return gguf.size_label(parameters, parameters, 0, 0)


def _shape_fields(shape: ModelShape, layers: int) -> Fields:
    fields: Fields = {
        "block_count": (layers, "UINT32"),
        "context_length": (shape.context, "UINT32"),
        "embedding_length": (shape.hidden, "UINT32"),
        "feed_forward_length": (shape.mlp, "UINT32"),
        "attention.head_count": (shape.heads, "UINT32"),
        "attention.head_count_kv": (shape.kv_heads, "UINT32"),
        "attention.key_length": (shape.head_dim, "UINT32"),
        "attention.value_length": (shape.head_dim, "UINT32"),
        "attention.layer_norm_rms_epsilon": (shape.rms_eps, "FLOAT32"),
        "rope.freq_base": (shape.rope_theta, "FLOAT32"),
    }
    if shape.rope_scaling:
        scaling = shape.rope_scaling
        fields["rope.scaling.type"] = "yarn", "STRING"
        fields["rope.scaling.factor"] = scaling["factor"], "FLOAT32"
        original = int(scaling["original_max_position_embeddings"])
        fields["rope.scaling.original_context_length"] = original, "UINT32"
        for key in ("beta_fast", "beta_slow"):
            if key in scaling:
                fields[f"rope.scaling.yarn_{key}"] = scaling[key], "FLOAT32"
    return {f"{ARCHITECTURE}.{key}": value for key, value in fields.items()}


def _vocabulary_fields(vocabulary: Vocabulary) -> Fields:
    fields: Fields = {
        "tokenizer.ggml.model": ("gpt2", "STRING"),
        "tokenizer.ggml.pre": (PRE_TOKENIZER, "STRING"),
        "tokenizer.ggml.tokens": (vocabulary.tokens, "ARRAY:STRING"),
        "tokenizer.ggml.token_type": (vocabulary.types, "ARRAY:INT32"),
        "tokenizer.ggml.merges": (vocabulary.merges, "ARRAY:STRING"),
    }
    # the specification's own spellings
    spelled = {"unk": "unknown", "sep": "seperator", "pad": "padding"}
    for key, id_ in vocabulary.special.items():
        fields[f"tokenizer.ggml.{spelled.get(key, key)}_token_id"] = id_, "UINT32"
    # said outright: other programs have defaults of their own
    fields["tokenizer.ggml.add_bos_token"] = False, "BOOL"
    fields["tokenizer.ggml.add_eos_token"] = False, "BOOL"
    if vocabulary.template is not None:
        fields["tokenizer.chat_template"] = vocabulary.template, "STRING"
    return fields


def _field(value: Any) -> tuple[Any, str]:
    """A value with the kind that holds it without loss."""
    if isinstance(value, bool):
        return value, "BOOL"
    if isinstance(value, str):
        return value, "STRING"
    if isinstance(value, int):
        return value, "UINT32" if 0 <= value < 1 << 32 else "INT64"
    if isinstance(value, float):
        return value, "FLOAT64"
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return list(value), "ARRAY:STRING"
    raise TypeError(f"metadata can't hold {value!r}")


def _write(
    out: Path,
    fields: Fields,
    tensors: TensorFolder,
    weights: Sequence[_Weight],
    progress: Callable[[int, int], None] | None,
) -> Converted:
    total, written = sum(weight.bytes for weight in weights), 0
    with replacing(out) as file:
        _write_header(Path(file.name), fields, weights)
        file.seek(0, 2)
        for weight in weights:
            _pad(file)
            for data in _encoded(tensors, weight):
                file.write(data.data)
                written += data.nbytes
                if progress:
                    progress(written, total)
        _pad(file)
    parameters = sum(math.prod(weight.shape) for weight in weights)
    return Converted(out, len(weights), parameters, out.stat().st_size)


def _write_header(path: Path, fields: Fields, weights: Sequence[_Weight]) -> None:
    import gguf

    types = {"f32": gguf.GGMLQuantizationType.F32, "f16": gguf.GGMLQuantizationType.F16}
    types["bf16"] = gguf.GGMLQuantizationType.BF16
    writer = gguf.GGUFWriter(None, ARCHITECTURE)
    for key, (value, kind) in fields.items():
        if value == []:
            continue  # the library can't write an array without items
        outer, _, inner = kind.partition(":")
        form = gguf.GGUFValueType[outer]
        writer.kv_data[0].pop(key, None)  # a value of its own, or one that we gave before
        writer.add_key_value(key, value, form, gguf.GGUFValueType[inner] if inner else None)
    for weight in weights:
        writer.add_tensor_info(weight.name, weight.shape, np.dtype("f4"), weight.bytes, types[weight.dtype])
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def _pad(file: BinaryIO) -> None:
    import gguf

    file.write(bytes(-file.tell() % gguf.GGUF_DEFAULT_ALIGNMENT))


def _encoded(tensors: TensorFolder, weight: _Weight) -> Iterator[np.ndarray]:
    """A tensor's values as they stand in the GGUF file, a piece at a time."""
    place = f"tensor {weight.source!r} of {tensors.info(weight.source).file}"
    for block in tensors.blocks(weight.source):
        if weight.factor != 1:
            block = block * np.float32(weight.factor)
        if not np.isfinite(block).all():
            what = "NaN" if np.isnan(block).any() else "infinity"
            raise UserError(f"{place} holds {what}; the model was damaged in training or on the way, train it again")
        if weight.dtype == "f32":
            yield block
        elif weight.dtype == "bf16":
            yield bf16(block)
        else:
            with np.errstate(over="ignore"):
                half = block.astype("<f2")
            if not np.isfinite(half).all():
                raise UserError(
                    f"{place} holds {np.abs(block).max():g}, more than f16 can ({LARGEST_F16:g}); type --type bf16"
                )
            yield half


def bf16(values: np.ndarray) -> np.ndarray:
    """Finite float32 values as bfloat16 (their bits, uint16), rounded to nearest, ties to even.

    >>> bf16(np.array([1.0, -2.0, 1.00390625], np.float32)).tolist()
    [16256, 49152, 16256]
    """
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")
