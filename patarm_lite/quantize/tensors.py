"""Safetensors folders read and written tensor by tensor, without torch and without holding a model in memory.

Reading goes through `pread`, not a memory map: mapped pages count as the process's own memory, and a file that is cut
while it is mapped kills the process. `blocks` hands a tensor over in pieces, so that even an embedding of gigabytes
costs some megabytes. Headers are hostile until checked. Pickled weights (`pytorch_model.bin`) are never read.

Source: the safetensors format (huggingface.co/docs/safetensors), shards and index as `save_pretrained` names them.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from patarm_lite.errors import UserError

ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
"""Type of a tensor as the format names it -> bytes of one value."""

FLOATS: dict[str, np.dtype[Any]] = {
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}
"""Types that `f32` and `blocks` read, and how their bytes lie (numpy has no bf16: its upper half of an f32)."""

LARGEST_HEADER = 100_000_000
"""Bytes; the reference implementation's own limit."""
BLOCK = 1 << 22
"""Values that `blocks` hands over at a time: 16 MiB of f32."""
SHARD_BYTES = 4_000_000_000


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Type (`F32`, `F16`, `BF16`, `U8`, ...), shape and size of a tensor, and where its bytes lie."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int
    file: Path
    offset: int


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor to be written. `produce` is called once, when its turn comes, and returns its bytes in C order.

    An array of the right number of bytes will do, whatever its type.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    produce: Callable[[], Any]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


class TensorFolder:
    """The tensors of a folder: `model.safetensors`, or the shards that `model.safetensors.index.json` names.

    Args:
        folder: the folder.
        stem: `model`, or `adapter_model` for a PEFT adapter.

    Raises:
        UserError: no such file, a shard is missing, or a header is damaged or contradicts the file's size.
    """

    def __init__(self, folder: Path, stem: str = "model") -> None:
        self.folder = folder
        self._tensors: dict[str, TensorInfo] = {}
        single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
        if single.is_file():
            self._tensors = read_header(single)
        elif index.is_file():
            self._tensors = _read_shards(index)
        else:
            raise UserError(_nothing_there(folder, stem))

    def names(self) -> dict[str, TensorInfo]:
        """Name -> what it is, sorted by name."""
        return dict(sorted(self._tensors.items()))

    def info(self, name: str) -> TensorInfo:
        """What the tensor of that name is.

        Raises:
            UserError: there is none.
        """
        if name not in self._tensors:
            raise UserError(f"{self.folder} has no tensor {name!r}; is it the whole model?")
        return self._tensors[name]

    def raw(self, name: str) -> np.ndarray:
        """A tensor's bytes as they lie in the file (uint8, one dimension)."""
        return self._read(name, 0, self.info(name).bytes)

    def f32(self, name: str) -> np.ndarray:
        """A tensor in its shape as float32.

        Raises:
            UserError: there is none, or it does not hold floating-point numbers.
        """
        info = self.info(name)
        values = np.empty(math.prod(info.shape), np.float32)
        place = 0
        for block in self.blocks(name):
            values[place : place + block.size] = block
            place += block.size
        return values.reshape(info.shape)

    def blocks(self, name: str, values: int = BLOCK) -> Iterator[np.ndarray]:
        """A tensor's values in order as float32 (one dimension), at most so many at a time."""
        info = self.info(name)
        if info.dtype not in FLOATS:
            raise UserError(
                f"tensor {name!r} of {info.file} holds {info.dtype} values, no floating-point numbers; "
                "give the 16-bit or 32-bit original of the model"
            )
        form = FLOATS[info.dtype]
        step = values * form.itemsize
        for start in range(0, info.bytes, step):
            found = self._read(name, start, min(step, info.bytes - start)).view(form)
            if info.dtype == "BF16":
                yield (found.astype(np.uint32) << np.uint32(16)).view(np.float32)
            elif info.dtype == "F32":
                yield found
            else:
                with np.errstate(over="ignore"):
                    yield found.astype(np.float32)

    def _read(self, name: str, start: int, count: int) -> np.ndarray:
        info = self._tensors[name]
        found = np.empty(count, np.uint8)
        with info.file.open("rb", buffering=0) as file:
            file.seek(info.offset + start)
            view, place = found.data, 0
            while place < count:
                got = file.readinto(view[place:])
                if not got:
                    raise UserError(f"{info.file} ended while tensor {name!r} was read; it was cut after it was opened")
                place += got
        return found


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, checked against its size.

    Raises:
        UserError: damaged, cut, or tensors that overlap or leave holes.
    """
    try:
        return _parse_header(path)
    except _Damaged as error:
        raise UserError(f"{path} is not a sound safetensors file: {error}; get the file again") from None


class _Damaged(Exception):
    """What is wrong with a file, in words."""


def _parse_header(path: Path) -> dict[str, TensorInfo]:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        first = file.read(8)
        if len(first) < 8:
            raise _Damaged(f"it has {size} bytes")
        (length,) = struct.unpack("<Q", first)
        if length > min(LARGEST_HEADER, size - 8):
            raise _Damaged(f"it says its header has {length} bytes, and the file has {size} (it may be cut)")
        text = file.read(length)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise _Damaged("its header is not JSON") from None
    if not isinstance(header, dict):
        raise _Damaged("its header is not a JSON object")
    header.pop("__metadata__", None)
    found = {name: _parse_info(path, name, value, 8 + length) for name, value in header.items()}
    end = 8 + length
    for name, info in sorted(found.items(), key=lambda item: (item[1].offset, item[1].bytes)):
        if info.offset != end:
            raise _Damaged(f"tensor {name!r} {'overlaps another' if info.offset < end else 'lies behind a hole'}")
        end += info.bytes
    if end != size:
        raise _Damaged(f"its tensors end at byte {end}, and the file has {size} (it may be cut)")
    return found


def _parse_info(path: Path, name: str, value: Any, data_start: int) -> TensorInfo:
    try:
        dtype, shape, (start, end) = value["dtype"], value["shape"], value["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise _Damaged(f"tensor {name!r} lacks dtype, shape or data_offsets") from None
    if not isinstance(shape, list) or not all(type(number) is int and number >= 0 for number in [*shape, start, end]):
        raise _Damaged(f"tensor {name!r} has the impossible shape {shape!r} at {start!r} to {end!r}")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise _Damaged(f"tensor {name!r} has the unknown type {dtype!r}")
    if end - start != math.prod(shape) * ITEM_BYTES[dtype]:
        raise _Damaged(f"tensor {name!r} of {dtype} {shape} can't have {end - start} bytes")
    return TensorInfo(dtype, tuple(shape), end - start, path, data_start + start)


def _read_shards(index: Path) -> dict[str, TensorInfo]:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{index} names no shards (weight_map); get the file again") from None
    found: dict[str, TensorInfo] = {}
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise UserError(f"{index} names the shard {shard!r}, which is no file name; get the file again")
        if not (index.parent / shard).is_file():
            raise UserError(f"{index.parent} lacks the shard {shard} that its index names; get the file again")
        for name, info in read_header(index.parent / shard).items():
            if weight_map.get(name) == shard:
                found[name] = info
    missing = sorted(set(weight_map) - set(found))
    if missing:
        shard = weight_map[missing[0]]
        raise UserError(f"{index.parent / shard} lacks the tensor {missing[0]!r} that the index says it holds")
    return found


def _nothing_there(folder: Path, stem: str) -> str:
    if not folder.is_dir():
        return f"{folder} is not a folder; give a model's folder"
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if pickled:
        return f"{folder} holds {pickled[0]}, a pickled file, which is not read; save it as safetensors"
    return f"{folder} has no {stem}.safetensors"


def write_tensors(path: Path, entries: Sequence[Entry], metadata: Mapping[str, str] | None = None) -> None:
    """Write one safetensors file, one tensor in memory at a time. It appears by rename; on an error nothing is left.

    Args:
        path: where.
        entries: what; wide types are laid first, so that every tensor is aligned, otherwise in this order.
        metadata: strings for the header; none: `{"format": "pt"}`, as `save_pretrained` writes.
    """
    ordered = sorted(entries, key=lambda entry: -ITEM_BYTES[entry.dtype])
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    place = 0
    for entry in ordered:
        if entry.name in header:
            raise ValueError(f"tensor {entry.name!r} twice")
        offsets = [place, place + entry.bytes]
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
        place += entry.bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in ordered:
            data = entry.produce()
            view = np.ascontiguousarray(data).data if isinstance(data, np.ndarray) else memoryview(data)
            if view.nbytes != entry.bytes:
                raise ValueError(f"tensor {entry.name!r}: {view.nbytes} bytes instead of {entry.bytes}")
            if view.nbytes:
                file.write(view.cast("B"))
            del data, view  # before the next one is made


def write_sharded(folder: Path, entries: Iterable[Entry], shard_bytes: int = SHARD_BYTES) -> list[Path]:
    """Write `model.safetensors`, or shards of at most so many bytes (one tensor at least) and their index.

    Returns:
        The files, the index last.
    """
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(other.bytes for other in shards[-1]) + entry.bytes > shard_bytes:
            shards.append([])
        shards[-1].append(entry)
    if len(shards) == 1:
        write_tensors(folder / "model.safetensors", shards[0])
        return [folder / "model.safetensors"]
    written: list[Path] = []
    try:
        for number, shard in enumerate(shards, 1):
            path = folder / f"model-{number:05}-of-{len(shards):05}.safetensors"
            write_tensors(path, shard)
            written.append(path)
        places = zip(shards, written, strict=True)
        index = {
            "metadata": {"total_size": sum(entry.bytes for shard in shards for entry in shard)},
            "weight_map": {entry.name: path.name for shard, path in places for entry in shard},
        }
        with replacing(folder / "model.safetensors.index.json") as file:
            file.write(json.dumps(index, indent=2, sort_keys=True).encode())
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        raise
    return [*written, folder / "model.safetensors.index.json"]


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the block ends well; after an error nothing is left of it."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
