"""The header of a GGUF file, read strictly: metadata, and where each tensor lies. Files are hostile until checked.

Every count, length and offset is compared with the file's size before anything is allocated for it, so a damaged or
forged header costs neither memory nor time and ends as one line. Nothing is mapped into memory: a file that is cut
while it is open can't kill the process. Weights are not looked at here. Needs nothing but the standard library.

Source: the GGUF specification (version 2 and 3) of ggml, `docs/gguf.md`, and the types of `ggml.h`.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from patarm_lite.errors import UserError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
MOST_DIMENSIONS = 4
LONGEST_NAME = 127
LONGEST_KEY = 65_535
BLOCK = 1 << 22
"""Bytes read at once by `blocks_of`."""

TENSOR_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
}
"""Number in the file -> name, weights in a block, bytes of a block."""

_NUMBERS = {
    0: ("UINT8", "B"),
    1: ("INT8", "b"),
    2: ("UINT16", "H"),
    3: ("INT16", "h"),
    4: ("UINT32", "I"),
    5: ("INT32", "i"),
    6: ("FLOAT32", "f"),
    7: ("BOOL", "?"),
    10: ("UINT64", "Q"),
    11: ("INT64", "q"),
    12: ("FLOAT64", "d"),
}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor of a GGUF file. `shape`: ggml's order, row length first. `offset`: from the file's beginning, bytes."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    bytes: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """What a GGUF file's header says.

    `kinds`: the type of each metadata value, such as `UINT32`, `STRING` or `ARRAY:STRING`. `spans`: where each
    metadata entry (key, type and value) stands in the file, first byte and the one behind the last. `data_start`:
    where the tensors' bytes begin. `size`: bytes of the file.
    """

    path: Path
    version: int
    metadata: dict[str, Any]
    kinds: dict[str, str]
    spans: dict[str, tuple[int, int]]
    tensors: tuple[GgufTensor, ...]
    data_start: int
    size: int

    def tensor(self, name: str) -> GgufTensor:
        """The tensor of that name.

        Raises:
            UserError: there is none.
        """
        for tensor in self.tensors:
            if tensor.name == name:
                return tensor
        raise UserError(f"{self.path} has no tensor {name!r}")


def blocks_of(data: BinaryIO, start: int, count: int) -> Iterator[bytes]:
    """So many bytes of an open file from `start` on, in blocks that cost little memory.

    Raises:
        UserError: the file was cut since its header was read.
    """
    data.seek(start)
    while count:
        block = data.read(min(BLOCK, count))
        if not block:
            raise UserError(f"{data.name} was cut while it was read; get the file again")
        yield block
        count -= len(block)


class _Damaged(Exception):
    """What is wrong with a header, in words."""


def read_gguf(path: Path) -> GgufFile:
    """Read the header of a GGUF file and check it against the file's size.

    Raises:
        UserError: no such file, not a GGUF file, or a header that is damaged, cut or contradicts the file's size.
    """
    try:
        with path.open("rb") as file:
            return _Reader(path, file).read()
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{path} is not a file; give a GGUF file") from None
    except _Damaged as error:
        raise UserError(f"{path} is not a sound GGUF file: {error}; get the file again and compare its hash") from None


class _Reader:
    """Reads forward through a header. Never more bytes than the file has left."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.size = os.fstat(file.fileno()).st_size
        self.place = 0

    def read(self) -> GgufFile:
        magic = self.bytes(min(4, self.size), "magic")
        if magic != MAGIC:
            raise _Damaged(f"it begins with {magic!r}, not with {MAGIC!r}")
        version = self.number("I", "version")
        if version not in VERSIONS:
            raise _Damaged(f"version {version} (this reads {' and '.join(map(str, VERSIONS))})")
        tensors = self.count("tensors", least_bytes=24)
        entries = self.count("metadata entries", least_bytes=13)
        metadata: dict[str, Any] = {}
        kinds: dict[str, str] = {}
        spans: dict[str, tuple[int, int]] = {}
        for number in range(entries):
            start = self.place
            key = self.string(f"key {number + 1}", LONGEST_KEY)
            if key in metadata:
                raise _Damaged(f"metadata key {key!r} stands there twice")
            metadata[key], kinds[key] = self.value(self.number("I", f"type of {key!r}"), f"value of {key!r}")
            spans[key] = (start, self.place)
        infos = [self.tensor_info(number) for number in range(tensors)]
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
            raise _Damaged(f"alignment {alignment!r}")
        data_start = -(-self.place // alignment) * alignment
        placed = tuple(self.place_tensor(info, data_start, alignment) for info in infos)
        _check_apart(placed)
        return GgufFile(self.path, version, metadata, kinds, spans, placed, data_start, self.size)

    def bytes(self, count: int, what: str) -> bytes:
        if count > self.size - self.place:
            raise _Damaged(f"it ends inside {what}")
        found = self.file.read(count)
        if len(found) != count:
            raise _Damaged(f"it was cut while it was read ({what})")
        self.place += count
        return found

    def number(self, form: str, what: str) -> Any:
        return struct.unpack("<" + form, self.bytes(struct.calcsize("<" + form), what))[0]

    def count(self, what: str, least_bytes: int) -> int:
        """A count of things that each take at least so many bytes."""
        found = int(self.number("Q", f"the number of {what}"))
        if found * least_bytes > self.size - self.place:
            raise _Damaged(f"it says {found} {what}, more than fit into its {self.size} bytes")
        return found

    def string(self, what: str, longest: int | None = None) -> str:
        length = int(self.number("Q", what))
        if longest is not None and length > longest:
            raise _Damaged(f"{what} is {length} bytes long")
        return self.bytes(length, what).decode("utf-8", "surrogateescape")

    def value(self, kind: int, what: str) -> tuple[Any, str]:
        if kind == _STRING:
            return self.string(what), "STRING"
        if kind == _ARRAY:
            item = self.number("I", what)
            if item == _STRING:
                count = self.count(f"strings in {what}", least_bytes=8)
                return [self.string(what) for _ in range(count)], "ARRAY:STRING"
            name, form = self.number_form(item, what)
            count = self.count(f"items in {what}", least_bytes=struct.calcsize("<" + form))
            packed = self.bytes(count * struct.calcsize("<" + form), what)
            return list(struct.unpack(f"<{count}{form}", packed)), f"ARRAY:{name}"
        name, form = self.number_form(kind, what)
        return self.number(form, what), name

    def number_form(self, kind: int, what: str) -> tuple[str, str]:
        if kind not in _NUMBERS:
            raise _Damaged(f"{what} has the unknown type {kind}")
        return _NUMBERS[kind]

    def tensor_info(self, number: int) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string(f"the name of tensor {number + 1}", LONGEST_NAME)
        dimensions = self.number("I", f"the shape of {name!r}")
        if not 0 < dimensions <= MOST_DIMENSIONS:
            raise _Damaged(f"tensor {name!r} has {dimensions} dimensions")
        shape = tuple(self.number("Q", f"the shape of {name!r}") for _ in range(dimensions))
        return name, shape, self.number("I", f"the type of {name!r}"), self.number("Q", f"the place of {name!r}")

    def place_tensor(self, info: tuple[str, tuple[int, ...], int, int], data_start: int, alignment: int) -> GgufTensor:
        name, shape, kind, offset = info
        if kind not in TENSOR_TYPES:
            raise _Damaged(f"tensor {name!r} has the unknown type {kind}")
        type_name, block, block_bytes = TENSOR_TYPES[kind]
        weights = 1
        for length in shape:
            weights *= length
        if not weights or shape[0] % block:
            raise _Damaged(f"tensor {name!r} of type {type_name} has the impossible shape {list(shape)}")
        size = weights // block * block_bytes
        if offset % alignment or data_start + offset + size > self.size:
            raise _Damaged(f"tensor {name!r} lies outside its {self.size} bytes (the file may be cut)")
        return GgufTensor(name, shape, type_name, data_start + offset, size)


def _check_apart(tensors: tuple[GgufTensor, ...]) -> None:
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise _Damaged("a tensor's name stands there twice")
    end = 0
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        if tensor.offset < end:
            raise _Damaged(f"tensor {tensor.name!r} overlaps another")
        end = tensor.offset + tensor.bytes
