"""A PEFT LoRA adapter: which tensors of its base it changes and how, and whether a base fits it. No torch.

A low-rank change of a linear layer is `W + scale * B A`, of an embedding `W + scale * (B A)^T`, with scale
`alpha / r`, or `alpha / sqrt(r)` for rank-stabilised LoRA (PEFT's `LoraLayer.update_layer`). A module of
`modules_to_save` replaces the base's tensor. Everything else that PEFT offers under the name of LoRA is refused: left
out in silence it would give another judge.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patarm_lite.errors import UserError
from patarm_lite.quantize.tensors import TensorFolder
from patarm_lite.quantize.vocabulary import read_json

CONFIG_FILE = "adapter_config.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
PREFIX = "base_model.model."
"""What PEFT puts before the base's own names."""
LEAVES_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that begin on the base's own weights; others (pissa, olora, ...) change them first."""
UNSUPPORTED = (
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "velora_config",
)
"""Settings that change what an adapter computes; every `use_...` but `use_rslora` is refused too."""
_PART = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?:\.weight)?")


@dataclass(frozen=True, slots=True)
class LowRank:
    """A low-rank change of one tensor: names of its factors in the adapter, and what their product is scaled by."""

    a: str
    b: str
    scale: float
    embedding: bool = False


@dataclass(frozen=True, slots=True)
class Adapter:
    """What an adapter does to its base. Keys of `changes` and `replaced` are names of the base's tensors.

    `base` and `revision` are what the adapter says of its base: a folder or a hub id.
    """

    folder: Path
    tensors: TensorFolder
    config: Mapping[str, Any]
    base: str
    revision: str | None
    changes: Mapping[str, LowRank]
    replaced: Mapping[str, str]

    @property
    def touched(self) -> frozenset[str]:
        """Names of the base's tensors that the adapter changes."""
        return frozenset((*self.changes, *self.replaced))


def read_adapter(folder: Path) -> Adapter:
    """The adapter of a folder: adapter_config.json and adapter_model.safetensors.

    Raises:
        UserError: damaged, or something that a plain merge can't do.
    """
    config = read_json(folder / CONFIG_FILE)
    _check_config(folder, config)
    tensors = TensorFolder(folder, "adapter_model")
    factors: dict[str, dict[str, str]] = {}
    embeddings: set[str] = set()
    replaced: dict[str, str] = {}
    for name in tensors.names():
        if not name.startswith(PREFIX):
            raise UserError(f"{folder}: tensor {name!r} of the adapter is not PEFT's; save the adapter with PEFT")
        part = _PART.fullmatch(name.removeprefix(PREFIX))
        if part is not None:
            factors.setdefault(part["module"], {})[part["side"]] = name
            if part["embedding"]:
                embeddings.add(part["module"])
        elif name.endswith(".weight") and ".lora_" not in name:
            replaced[name.removeprefix(PREFIX).replace(".base_layer.", ".")] = name
        else:
            raise UserError(
                f"{folder}: the adapter has the tensor {name!r}, which is no plain LoRA and can't be merged here; "
                "merge it with PEFT's merge_and_unload, save that, and export the folder"
            )
    if not factors and not replaced:
        raise UserError(f"{folder}: the adapter changes nothing (it holds no tensors); train it first")
    changes = {
        f"{module}.weight": _low_rank(folder, tensors, config, module, sides, module in embeddings)
        for module, sides in factors.items()
    }
    return Adapter(
        folder, tensors, config, str(config["base_model_name_or_path"]), config.get("revision"), changes, replaced
    )


def _check_config(folder: Path, config: Mapping[str, Any]) -> None:
    kind, task = config.get("peft_type"), config.get("task_type")
    instead = "merge it with PEFT's merge_and_unload, save that, and export the folder"
    if kind != "LORA":
        raise UserError(f"{folder}: the adapter is of kind {kind!r}, and only LORA can be merged here; {instead}")
    if task not in (None, "CAUSAL_LM"):
        raise UserError(
            f"{folder}: the adapter's task is {task}, a scalar head or a classifier: it writes no judgements, "
            "so there is nothing to export; give a judge trained with method par, sft or rejection"
        )
    if config.get("use_dora"):
        raise UserError(f"{folder}: the adapter is a DoRA, whose magnitudes are not merged here; {instead}")
    odd = [key for key in config if key.startswith("use_") and key not in ("use_rslora", "use_dora")]
    for key in (*UNSUPPORTED, *sorted(odd)):
        if config.get(key):
            raise UserError(f"{folder}: the adapter has {key}={config[key]!r}, which is not merged here; {instead}")
    start = config.get("init_lora_weights", True)
    if start not in LEAVES_THE_BASE:
        raise UserError(
            f"{folder}: the adapter began with init_lora_weights={start!r}, which changes the base itself, so it fits "
            f"no unchanged base; {instead}"
        )
    if not isinstance(config.get("base_model_name_or_path"), str) or not config["base_model_name_or_path"]:
        raise UserError(f"{folder / CONFIG_FILE} names no base_model_name_or_path; add the base's folder or hub id")
    if not isinstance(config.get("r"), int) or not isinstance(config.get("lora_alpha"), int | float):
        raise UserError(f"{folder / CONFIG_FILE} lacks r or lora_alpha; get the file again")


def _low_rank(
    folder: Path,
    tensors: TensorFolder,
    config: Mapping[str, Any],
    module: str,
    sides: Mapping[str, str],
    embedding: bool,
) -> LowRank:
    if set(sides) != {"A", "B"}:
        lacks = ({"A", "B"} - set(sides)).pop()
        raise UserError(f"{folder}: the adapter has no lora_{lacks} for {module}; get adapter_model.safetensors again")
    rank = _by_pattern(config.get("rank_pattern"), module, config["r"])
    alpha = _by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    a, b = tensors.info(sides["A"]).shape, tensors.info(sides["B"]).shape
    if len(a) != 2 or len(b) != 2 or not a[0] == b[1] == rank:
        raise UserError(
            f"{folder}: the adapter's factors of {module} are {list(a)} and {list(b)}, and its config says rank "
            f"{rank}; adapter_config.json and adapter_model.safetensors don't belong together"
        )
    return LowRank(sides["A"], sides["B"], alpha / (math.sqrt(rank) if config.get("use_rslora") else rank), embedding)


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value whose pattern is the module's name or its end; the first one counts, as in PEFT."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def logical_shapes(tensors: TensorFolder) -> dict[str, tuple[int, ...]]:
    """Shapes of a folder's weights as the model sees them: of 4-bit weights the shape before quantization."""
    names = tensors.names()
    states = {name.partition(".quant_state.")[0]: name for name in names if ".quant_state." in name}
    beside = tuple(f"{name}." for name in states)
    return {
        name: _shape_before(tensors, states[name]) if name in states else info.shape
        for name, info in names.items()
        if not name.startswith(beside)
    }


def _shape_before(tensors: TensorFolder, state: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in json.loads(tensors.raw(state).tobytes())["shape"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{tensors.folder}: {state!r} is damaged; get the folder again") from None


def check_fits(adapter: Adapter, base: str, shapes: Mapping[str, tuple[int, ...]], tied: bool) -> None:
    """Refuse a base that the adapter was not trained on, as far as names and shapes tell.

    Args:
        base: how the base is called in the error.
        shapes: tensor -> shape of the base (`logical_shapes`).
        tied: whether the base's `lm_head.weight` is its embedding.

    Raises:
        UserError: the first tensor that doesn't fit.
    """

    def refuse(what: str) -> UserError:
        return UserError(
            f"base {base} doesn't fit the adapter {adapter.folder}: {what}; give the right one with --base"
        )

    known = dict(shapes)
    if tied and EMBEDDING in known:
        known[HEAD] = known[EMBEDDING]
        if adapter.config.get("ensure_weight_tying") and adapter.touched & {HEAD, EMBEDDING}:
            raise UserError(
                f"{adapter.folder}: the adapter changes a tied embedding and head as one (ensure_weight_tying), which "
                "is not merged here; merge it with PEFT's merge_and_unload, save that, and export the folder"
            )
    for name, change in adapter.changes.items():
        (rank, columns), (rows, _) = (adapter.tensors.info(part).shape for part in (change.a, change.b))
        wanted = (columns, rows) if change.embedding else (rows, columns)
        if name not in known:
            raise refuse(f"it has no {name}, which the adapter changes")
        if known[name] != wanted:
            raise refuse(f"{name} is {list(known[name])} there and {list(wanted)} in the adapter (rank {rank})")
    for name, part in adapter.replaced.items():
        shape = adapter.tensors.info(part).shape
        if known.get(name) != shape:
            raise refuse(f"{name} is {list(known[name]) if name in known else 'absent'} there and {list(shape)} here")
    for name in _targets(adapter.config, (name for name, shape in shapes.items() if len(shape) == 2)):
        if name not in adapter.changes:
            raise refuse(f"it has {name}, which the adapter would change and holds nothing for (a deeper model?)")


def _targets(config: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """The weights that PEFT would put the adapter on (`check_target_module_exists`); none where that is not said."""
    target, apart = config.get("target_modules"), config.get("exclude_modules") or ()
    saved = config.get("modules_to_save") or ()
    if not target or target == "all-linear" or config.get("layers_to_transform") is not None:
        return []

    def named(words: str | Iterable[str], module: str) -> bool:
        if isinstance(words, str):
            return re.fullmatch(words, module) is not None
        return any(module == word or module.endswith(f".{word}") for word in words)

    modules = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
    return [
        f"{module}.weight"
        for module in modules
        if named(target, module)
        and not (apart and named(apart, module))
        and not any(re.match(rf"(^|.*\.){word}($|\..*)", module) for word in saved)
    ]
