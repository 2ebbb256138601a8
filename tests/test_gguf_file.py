"""The GGUF header reader: what a sound file says, and that no damaged one costs more than one line."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patarm_lite.errors import UserError
from patarm_lite.gguf_file import TENSOR_TYPES, read_gguf

gguf = pytest.importorskip("gguf")
np = pytest.importorskip("numpy")


def write(path: Path) -> Path:
    """A small file by the gguf package: an independent writer."""
    writer = gguf.GGUFWriter(str(path), "qwen3")
    writer.add_string("patarm.note", "Grüße ☂")
    writer.add_uint32("qwen3.block_count", 2)
    writer.add_float32("a.float", 0.5)
    writer.add_bool("a.bool", True)
    writer.add_array("a.strings", ["x", "", "ж"])
    writer.add_array("a.numbers", [1, -2, 3])
    writer.add_tensor("one.weight", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("two.weight", np.zeros((4, 64), dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write(tmp_path_factory.mktemp("gguf") / "sound.gguf").read_bytes()


def damaged(tmp_path: Path, data: bytes) -> str:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        read_gguf(path)
    return str(caught.value)


def test_metadata_and_tensors_of_a_file_written_by_another_library(tmp_path: Path) -> None:
    found = read_gguf(write(tmp_path / "f.gguf"))
    assert found.metadata == {
        "general.architecture": "qwen3",
        "patarm.note": "Grüße ☂",
        "qwen3.block_count": 2,
        "a.float": 0.5,
        "a.bool": True,
        "a.strings": ["x", "", "ж"],
        "a.numbers": [1, -2, 3],
    }
    assert found.kinds["a.strings"] == "ARRAY:STRING" and found.kinds["qwen3.block_count"] == "UINT32"
    assert [(t.name, t.shape, t.type, t.bytes) for t in found.tensors] == [
        ("one.weight", (3, 2), "F32", 24),
        ("two.weight", (64, 4), "F16", 512),
    ]
    data = found.path.read_bytes()
    one = found.tensor("one.weight")
    assert struct.unpack("<6f", data[one.offset : one.offset + one.bytes]) == (0, 1, 2, 3, 4, 5)
    start, end = found.spans["patarm.note"]
    assert data[start:end].endswith("Grüße ☂".encode())


def test_the_block_sizes_are_those_of_the_gguf_package() -> None:
    for number, (name, block, size) in TENSOR_TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert (kind.name, *gguf.GGML_QUANT_SIZES[kind]) == (name, block, size)


def test_the_real_vocabulary_file_is_read(shared: Path) -> None:
    found = read_gguf(shared / "models" / "ggml-vocab-qwen2.gguf")
    assert len(found.metadata["tokenizer.ggml.tokens"]) == 151_936
    assert found.tensors == ()


def test_a_file_cut_anywhere_is_refused(sound: bytes, tmp_path: Path) -> None:
    for length in range(0, len(sound), 7):
        message = damaged(tmp_path, sound[:length])
        assert "not a sound GGUF file" in message and "\n" not in message


@pytest.mark.parametrize(
    ("place", "form", "value", "words"),
    [
        (0, "<I", 0x46554748, "begins with"),
        (4, "<I", 1, "version 1"),
        (4, "<I", 4_000_000, "version 4000000"),
        (8, "<Q", 1 << 60, "tensors, more than fit"),
        (16, "<Q", 1 << 60, "metadata entries, more than fit"),
        (24, "<Q", 1 << 62, "bytes long"),
    ],
)
def test_a_forged_count_allocates_nothing(
    sound: bytes, tmp_path: Path, place: int, form: str, value: int, words: str
) -> None:
    data = bytearray(sound)
    struct.pack_into(form, data, place, value)
    assert words in damaged(tmp_path, bytes(data))


def test_a_tensor_outside_the_file_or_over_another_is_refused(sound: bytes, tmp_path: Path) -> None:
    name = sound.index(b"two.weight") + len(b"two.weight")
    place = name + 4 + 16 + 4  # dimensions, shape, type, then the offset
    data = bytearray(sound)
    struct.pack_into("<Q", data, place, 1 << 40)
    assert "outside" in damaged(tmp_path, bytes(data))
    struct.pack_into("<Q", data, place, 0)
    assert "overlaps" in damaged(tmp_path, bytes(data))
    struct.pack_into("<I", data, place - 4, 5)
    assert "unknown type 5" in damaged(tmp_path, bytes(data))


def test_no_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.gguf"):
        with pytest.raises(UserError, match="is not a file"):
            read_gguf(path)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_random_damage_ends_as_one_line_or_reads(
    sound: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    changed = bytearray(sound)
    for _ in range(data.draw(st.integers(1, 8))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "random.gguf"
    path.write_bytes(bytes(changed))
    try:
        read_gguf(path)
    except UserError as error:
        assert "\n" not in str(error)
