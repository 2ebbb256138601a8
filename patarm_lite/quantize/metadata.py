"""Metadata of a finished GGUF file, changed by copy and rename.

A change copies the tensors' bytes as they are, in blocks, and every key that stays with its type and bytes. It works on
anybody's files.
"""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from patarm_lite.errors import UserError
from patarm_lite.gguf_file import ALIGNMENT, MAGIC, TENSOR_TYPES, GgufFile, blocks_of, read_gguf

_KINDS = {
    "UINT8": (0, "B"),
    "INT8": (1, "b"),
    "UINT16": (2, "H"),
    "INT16": (3, "h"),
    "UINT32": (4, "I"),
    "INT32": (5, "i"),
    "FLOAT32": (6, "f"),
    "BOOL": (7, "?"),
    "UINT64": (10, "Q"),
    "INT64": (11, "q"),
    "FLOAT64": (12, "d"),
}
_STRING, _ARRAY = 8, 9


def rewrite(path: Path, changes: Mapping[str, Any]) -> None:
    """Set metadata keys of a GGUF file. It is written anew beside itself and renamed; after an error nothing changed.

    Args:
        changes: key -> str, bool, int, float or list of str; None removes the key. A key that is there keeps its place,
            and its type where the value fits it; new ones come last.

    Raises:
        UserError: not a sound GGUF file, a key that decides where tensors lie, or a disk that is full.
    """
    file = read_gguf(path)
    if "general.alignment" in changes:
        raise UserError(f"general.alignment of {path} can't be changed here: it decides where the tensors lie")
    part = path.with_name(path.name + ".part")
    try:
        with path.open("rb") as source, part.open("wb") as out:
            _copy_changed(file, changes, source, out)
            out.flush()
            os.fsync(out.fileno())
        shutil.copymode(path, part)
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"{path} can't be written anew: {error.strerror}; it needs {file.size} bytes of room") from None
    finally:
        part.unlink(missing_ok=True)


def _copy_changed(file: GgufFile, changes: Mapping[str, Any], source: BinaryIO, out: BinaryIO) -> None:
    kept = [key for key in file.spans if key not in changes or changes[key] is not None]
    added = [key for key, value in changes.items() if value is not None and key not in file.spans]
    out.write(MAGIC + struct.pack("<IQQ", file.version, len(file.tensors), len(kept) + len(added)))
    for key in kept:
        if key in changes:
            out.write(_entry(key, changes[key], file.kinds[key]))
        else:
            start, end = file.spans[key]
            _copy(source, out, start, end - start)
    for key in added:
        out.write(_entry(key, changes[key], None))
    for tensor in file.tensors:
        number = _type_number(tensor.type)
        shape = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)
        out.write(_text(tensor.name) + shape + struct.pack("<IQ", number, tensor.offset - file.data_start))
    alignment = int(file.metadata.get("general.alignment", ALIGNMENT))
    out.write(b"\0" * (-out.tell() % alignment))
    _copy(source, out, file.data_start, max(0, file.size - file.data_start))


def _type_number(name: str) -> int:
    return next(number for number, (known, _, _) in TENSOR_TYPES.items() if known == name)


def _copy(source: BinaryIO, out: BinaryIO, start: int, count: int) -> None:
    for block in blocks_of(source, start, count):
        out.write(block)


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data


def _entry(key: str, value: Any, kind: str | None) -> bytes:
    """A metadata entry: key, type, value."""
    if isinstance(value, str):
        return _text(key) + struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, list | tuple):
        if not all(isinstance(item, str) for item in value):
            raise TypeError(f"metadata {key!r} can't hold {value!r}")
        head = struct.pack("<IIQ", _ARRAY, _STRING, len(value))
        return _text(key) + head + b"".join(_text(item) for item in value)
    if not isinstance(value, bool | int | float):
        raise TypeError(f"metadata {key!r} can't hold {value!r}")
    number, packed = _number(value, kind)
    return _text(key) + struct.pack("<I", number) + packed


def _number(value: bool | int | float, kind: str | None) -> tuple[int, bytes]:
    """A number in the type it had, where that holds it, else in the first that does. A fraction may be rounded to the
    type it had: programs that ask for that type would refuse the file otherwise."""
    fallbacks = ("BOOL",) if isinstance(value, bool) else ("UINT32", "INT64", "UINT64")
    for name in (kind, *(("FLOAT64",) if isinstance(value, float) else fallbacks)):
        if name not in _KINDS or (name == "BOOL") != isinstance(value, bool):
            continue
        number, form = _KINDS[name]
        if isinstance(value, float) and form not in "fd":
            continue
        try:
            packed = struct.pack("<" + form, value)
        except (struct.error, OverflowError):
            continue
        rounded = isinstance(value, float) and name == kind
        if rounded or struct.unpack("<" + form, packed)[0] == value or value != value:
            return number, packed
    raise TypeError(f"metadata can't hold {value!r}")
