from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from patarm_lite.errors import UserError
from patarm_lite.quantize.tensors import Entry, TensorFolder, read_header, write_sharded, write_tensors


def entry(name: str, array: np.ndarray, dtype: str) -> Entry:
    return Entry(name, dtype, array.shape, lambda: array)


def raw_file(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def test_what_is_written_is_what_the_reference_library_reads(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.numpy")
    arrays = {
        "odd": np.arange(3, dtype=np.uint8),
        "half": np.arange(6, dtype=np.float16).reshape(2, 3),
        "single": np.array(2.5, np.float32),
        "none": np.zeros((0, 4), np.float32),
    }
    dtypes = {"odd": "U8", "half": "F16", "single": "F32", "none": "F32"}
    write_tensors(tmp_path / "model.safetensors", [entry(name, array, dtypes[name]) for name, array in arrays.items()])
    found = library.load_file(tmp_path / "model.safetensors")
    assert {name: (array.dtype, array.shape) for name, array in found.items()} == {
        name: (array.dtype, array.shape) for name, array in arrays.items()
    }
    assert all(np.array_equal(found[name], array) for name, array in arrays.items())


def test_what_the_reference_library_writes_is_read(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.numpy")
    arrays = {"b": np.ones((2, 2), np.float16), "a": np.array([[1.5]], np.float32), "c": np.arange(5, dtype=np.int8)}
    library.save_file(arrays, tmp_path / "model.safetensors")
    folder = TensorFolder(tmp_path)
    assert {name: (info.dtype, info.shape, info.bytes) for name, info in folder.names().items()} == {
        "a": ("F32", (1, 1), 4),
        "b": ("F16", (2, 2), 8),
        "c": ("I8", (5,), 5),
    }
    assert folder.raw("c").tolist() == [0, 1, 2, 3, 4]
    assert folder.f32("b").tolist() == [[1, 1], [1, 1]]
    with pytest.raises(UserError, match="I8 values"):
        folder.f32("c")


def test_bf16_is_the_upper_half_of_an_f32(tmp_path: Path) -> None:
    # 0x3F80 is 1, 0xC000 is -2, 0x4049 is 3.140625
    bits = np.array([[0x3F80, 0xC000, 0x4049]], np.uint16)
    write_tensors(tmp_path / "model.safetensors", [entry("x", bits, "BF16")])
    assert TensorFolder(tmp_path).f32("x").tolist() == [[1.0, -2.0, 3.140625]]


@given(st.integers(1, 12))
def test_blocks_are_the_tensor_in_pieces(tmp_path_factory: pytest.TempPathFactory, size: int) -> None:
    folder = tmp_path_factory.mktemp("blocks")
    values = np.arange(10, dtype=np.float16).reshape(5, 2)
    write_tensors(folder / "model.safetensors", [entry("x", values, "F16")])
    blocks = list(TensorFolder(folder).blocks("x", size))
    assert all(block.size <= size for block in blocks)
    assert np.concatenate(blocks).tolist() == list(range(10))


def test_shards_hold_no_more_than_they_may_and_an_index_names_them(tmp_path: Path) -> None:
    arrays = {f"t{number}": np.full(4, number, np.float32) for number in range(5)}
    written = write_sharded(tmp_path, (entry(name, array, "F32") for name, array in arrays.items()), shard_bytes=40)
    assert [path.name for path in written] == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
    ]
    assert sorted(read_header(written[0])) == ["t0", "t1"]
    assert json.loads(written[-1].read_text())["metadata"]["total_size"] == 80
    assert TensorFolder(tmp_path).f32("t4").tolist() == [4, 4, 4, 4]
    written[1].unlink()
    with pytest.raises(UserError, match="lacks the shard model-00002-of-00003"):
        TensorFolder(tmp_path)


def test_little_is_written_as_one_file(tmp_path: Path) -> None:
    assert write_sharded(tmp_path, [entry("x", np.zeros(3, np.float32), "F32")]) == [tmp_path / "model.safetensors"]


def test_one_tensor_at_a_time_is_made(tmp_path: Path) -> None:
    alive: list[int] = []

    class Held(np.ndarray):
        def __del__(self) -> None:
            alive.append(-1)

    def produce() -> np.ndarray:
        alive.append(1)
        assert sum(alive) == 1
        return np.zeros(4, np.float32).view(Held)

    write_tensors(tmp_path / "model.safetensors", [Entry(f"t{n}", "F32", (4,), produce) for n in range(3)])


def test_an_error_while_writing_leaves_what_was_there(tmp_path: Path) -> None:
    def fails() -> bytes:
        raise RuntimeError("no more")

    (tmp_path / "model.safetensors").write_text("older")
    entries = [entry("a", np.zeros(4, np.float32), "F32"), Entry("b", "F32", (4,), fails)]
    with pytest.raises(RuntimeError):
        write_tensors(tmp_path / "model.safetensors", entries)
    with pytest.raises(RuntimeError):
        write_sharded(tmp_path, entries, shard_bytes=16)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["older"]


@pytest.mark.parametrize(
    ("header", "data", "said"),
    [
        (b"not json", b"", "not JSON"),
        ([], b"", "not a JSON object"),
        ({"x": 3}, b"", "lacks dtype"),
        ({"x": ONE | {"dtype": "Q4"}}, b"\0" * 8, "unknown type 'Q4'"),
        ({"x": ONE | {"shape": [-2]}}, b"\0" * 8, "impossible shape"),
        ({"x": ONE | {"shape": [3]}}, b"\0" * 8, "can't have 8 bytes"),
        ({"x": ONE | {"shape": [10**30], "data_offsets": [0, 4 * 10**30]}}, b"\0" * 8, "the file has"),
        ({"x": ONE}, b"\0" * 7, "may be cut"),
        ({"x": ONE}, b"\0" * 9, "end at byte"),
        ({"x": ONE, "y": ONE | {"data_offsets": [4, 12]}}, b"\0" * 12, "'y' overlaps"),
        ({"x": ONE, "y": ONE | {"data_offsets": [12, 20]}}, b"\0" * 20, "'y' lies behind a hole"),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path: Path, header: Any, data: bytes, said: str) -> None:
    path = raw_file(tmp_path / "model.safetensors", header, data)
    with pytest.raises(UserError, match=said) as error:
        TensorFolder(tmp_path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_header_longer_than_the_file_costs_no_memory(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(UserError, match="may be cut"):
        TensorFolder(tmp_path)


@given(st.binary(max_size=80))
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError):
        TensorFolder(folder)


def test_a_file_cut_after_it_was_opened_is_an_error_not_a_crash(tmp_path: Path) -> None:
    write_tensors(tmp_path / "model.safetensors", [entry("x", np.zeros(4000, np.float32), "F32")])
    folder = TensorFolder(tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(UserError, match="cut after it was opened"):
        folder.f32("x")


def test_an_index_that_points_outside_the_folder_is_refused(tmp_path: Path) -> None:
    index = {"weight_map": {"x": "../other.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="no file name"):
        TensorFolder(tmp_path)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(UserError, match="pickled file"):
        TensorFolder(tmp_path)
