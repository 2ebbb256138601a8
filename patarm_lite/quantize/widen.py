"""A 16-bit GGUF file's own weights written out in f32, whole or a few layers only: what the parity gate computes with.

The metadata is copied byte for byte, but for the number of layers; so whatever is wrong with the file's vocabulary,
numbers or weights is wrong with the copy too. Tensors pass through memory in blocks.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from patarm_lite.errors import UserError
from patarm_lite.gguf_file import ALIGNMENT, MAGIC, GgufFile, GgufTensor
from patarm_lite.quantize.tensors import BLOCK, replacing

WIDTHS = {"F32": 4, "F16": 2, "BF16": 2}
"""Types that can be widened -> bytes of a value."""
_UINT32, _F32 = 4, 0
_LAYER = re.compile(r"blk\.(\d+)\.(.+)")


def layers_of(file: GgufFile) -> int:
    """Number of layers the file says it has.

    Raises:
        UserError: it says none.
    """
    count = file.metadata.get(_layers_key(file))
    if not isinstance(count, int) or count < 1:
        raise UserError(f"{file.path} has {_layers_key(file)} {count!r}; it is no language model, or it is damaged")
    return count


def chosen(file: GgufFile, layers: Sequence[int]) -> list[tuple[str, GgufTensor]]:
    """The tensors of some layers and all that belong to none, in the file's order, with their names in the copy.

    Layer `layers[i]` is called `i` there.
    """
    found: list[tuple[str, GgufTensor]] = []
    for tensor in file.tensors:
        match = _LAYER.fullmatch(tensor.name)
        if match is None:
            found.append((tensor.name, tensor))
        elif int(match[1]) in layers:
            found.append((f"blk.{list(layers).index(int(match[1]))}.{match[2]}", tensor))
    return found


def widened_bytes(file: GgufFile, layers: Sequence[int]) -> int:
    """Bytes of the tensors of such a copy."""
    return sum(4 * _values(tensor) for _, tensor in chosen(file, layers))


def widen(file: GgufFile, out: Path, layers: Sequence[int]) -> None:
    """Write the copy.

    Args:
        file: the header of a file with weights in f16, bf16 or f32.
        layers: which layers, ascending; `range(layers_of(file))` for all.

    Raises:
        UserError: a tensor of another type, or a file that was cut since its header was read.
    """
    tensors = chosen(file, layers)
    for _, tensor in tensors:
        if tensor.type not in WIDTHS:
            raise UserError(
                f"tensor {tensor.name!r} of {file.path} is of type {tensor.type}; parity is measured on 16-bit files"
            )
    alignment = file.metadata.get("general.alignment", ALIGNMENT)
    with file.path.open("rb") as source, replacing(out) as target:
        target.write(MAGIC + struct.pack("<IQQ", 3, len(tensors), len(file.metadata)))
        for key, (start, stop) in file.spans.items():
            own = key == _layers_key(file)
            target.write(_entry(key, len(layers)) if own else _at(source, start, stop - start))
        place = 0
        for name, tensor in tensors:
            target.write(_string(name) + struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape))
            target.write(struct.pack("<IQ", _F32, place))
            place += -(-4 * _values(tensor) // alignment) * alignment
        for _, tensor in tensors:
            _pad(target, alignment)
            for block in blocks(source, tensor):
                target.write(block.data)
        _pad(target, alignment)


def blocks(source: BinaryIO, tensor: GgufTensor) -> Iterator[np.ndarray]:
    """The values of a 16-bit or 32-bit tensor in order as float32."""
    step = BLOCK * WIDTHS[tensor.type]
    for start in range(0, tensor.bytes, step):
        count = min(step, tensor.bytes - start)
        data = _at(source, tensor.offset + start, count)
        if len(data) < count:
            raise UserError(
                f"{source.name} ended while tensor {tensor.name!r} was read; it was cut after it was opened"
            )
        if tensor.type == "F16":
            yield np.frombuffer(data, "<f2").astype(np.float32)
        elif tensor.type == "BF16":
            yield (np.frombuffer(data, "<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
        else:
            yield np.frombuffer(data, "<f4")


def _layers_key(file: GgufFile) -> str:
    return f"{file.metadata.get('general.architecture')}.block_count"


def _at(source: BinaryIO, place: int, count: int) -> bytes:
    source.seek(place)
    return source.read(count)


def _values(tensor: GgufTensor) -> int:
    return int(np.prod(tensor.shape, dtype=np.int64))


def _string(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data


def _entry(key: str, value: int) -> bytes:
    return _string(key) + struct.pack("<II", _UINT32, value)


def _pad(file: BinaryIO, alignment: int) -> None:
    file.write(bytes(-file.tell() % alignment))
