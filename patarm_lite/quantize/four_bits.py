"""bitsandbytes' 4-bit weights on a CPU: rounding a weight to NF4 as QLoRA holds it, and reading packed folders.

A weight is cut into blocks of 64 values that share a scale; the scales, less their mean, are rounded to 8 bits in
blocks of 256 (double quantization). Blocks run over rows, so a weight can be worked on in pieces: whole, the
temporaries of bitsandbytes' own functions would take five times the weight. Torch is imported inside functions.

Where rows are no multiple of 64, bitsandbytes 0.50.2 dequantizes wrongly on a CPU (seen with AVX-512): it is only
ever given rows of one block here.
"""

from __future__ import annotations

import math
from typing import Any

from patarm_lite.errors import UserError, missing_extra
from patarm_lite.quantize.tensors import TensorFolder

BLOCK, SCALES_BLOCK = 64, 256
"""Weights that share a scale, and scales that share one in turn: bitsandbytes' defaults, which training uses."""
BLOCKS = tuple(1 << power for power in range(5, 13))
"""Block sizes that bitsandbytes has: 32 to 4096."""
PIECE = 1 << 22
"""Values worked on at a time; a multiple of every block size."""


def functional() -> Any:
    """`bitsandbytes.functional`.

    Raises:
        UserError: it is not installed.
    """
    import logging

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # says on import that it has no CPU kernel: it needs none
    try:
        import bitsandbytes.functional
    except ImportError:
        raise missing_extra("train", "bitsandbytes") from None
    return bitsandbytes.functional


def round_nf4(weight: Any, dtype: Any) -> Any:
    """What is left of a float32 weight after NF4 with double quantization, in place.

    Args:
        weight: contiguous torch tensor, of values that `dtype` holds exactly.
        dtype: torch type that the weight is dequantized to, which rounds once more.
    """
    import torch

    bnb = functional()
    flat = weight.view(-1)
    packed, scales = [], []
    for start in range(0, flat.numel(), PIECE):
        codes, state = bnb.quantize_4bit(flat[start : start + PIECE], blocksize=BLOCK, quant_type="nf4")
        packed.append(codes)
        scales.append(state.absmax)
    scale = torch.cat(scales)
    mean = scale.mean()
    scale = bnb.dequantize_blockwise(*bnb.quantize_blockwise(scale - mean, blocksize=SCALES_BLOCK)) + mean
    unpack(torch.cat(packed), scale, BLOCK, "nf4", dtype, flat)
    return weight


def unpack(packed: Any, scales: Any, block: int, kind: str, dtype: Any, out: Any) -> None:
    """Dequantize 4-bit codes into `out` (float32, one dimension) by way of `dtype`, piece by piece."""
    bnb = functional()
    packed = packed.view(-1)
    for start in range(0, out.numel(), PIECE):
        piece = out[start : start + PIECE]
        count = piece.numel()
        state = bnb.QuantState(
            absmax=scales[start // block : -(-(start + count) // block)],
            shape=(count // block, block) if count % block == 0 else (1, count),
            dtype=dtype,
            blocksize=block,
            quant_type=kind,
        )
        codes = packed[start // 2 : (start + count + 1) // 2].view(-1, 1)
        piece.copy_(bnb.dequantize_4bit(codes, state).view(-1))


def parts_of(tensors: TensorFolder) -> dict[str, list[str]]:
    """Packed weight -> the names of what describes it (`.absmax`, `.quant_map`, ...); empty for plain weights."""
    owners = [name.partition(".quant_state.")[0] for name in tensors.names() if ".quant_state." in name]
    return {owner: [name for name in tensors.names() if name.startswith(f"{owner}.")] for owner in owners}


def read_packed(tensors: TensorFolder, name: str, parts: list[str]) -> Any:
    """A packed weight of a folder as a float32 torch tensor in its shape.

    Raises:
        UserError: it is damaged.
    """
    import torch

    bnb = functional()
    described = {part.removeprefix(f"{name}."): _tensor(tensors, part) for part in parts}
    try:
        state = bnb.QuantState.from_dict(described, torch.device("cpu"))
        scales = state.absmax
        if state.nested:
            scales = bnb.dequantize_blockwise(scales, state.state2) + state.offset
        if not scales.is_floating_point() or state.blocksize not in BLOCKS:
            raise ValueError("scales that are themselves packed, or an unknown block size")
        codes = torch.from_numpy(tensors.raw(name))
        count = math.prod(state.shape)
        if 2 * codes.numel() < count or scales.numel() * state.blocksize < count:
            raise ValueError("fewer codes or scales than its shape needs")
        out = torch.empty(state.shape, dtype=torch.float32)
        unpack(codes, scales.float(), state.blocksize, state.quant_type, state.dtype, out.view(-1))
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError, AssertionError) as error:
        line = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"{tensors.folder}: the 4-bit weight {name!r} is damaged ({line}); get the folder again"
        ) from None
    return out


def _tensor(tensors: TensorFolder, name: str) -> Any:
    import torch

    info = tensors.info(name)
    if info.dtype == "U8":
        return torch.from_numpy(tensors.raw(name)).reshape(info.shape)
    return torch.from_numpy(tensors.f32(name))
