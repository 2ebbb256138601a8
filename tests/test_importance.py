"""The importance matrix: what it measures, against numpy and llama.cpp's own tool, and which files are refused."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import pytest
from llama_cpp_tools import tool, write_model

from patarm_lite.errors import UserError
from patarm_lite.gguf_file import read_gguf
from patarm_lite.quantize import importance

np = pytest.importorskip("numpy")
gguf = pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

TEXTS = [b"The first response names a colour.", b"so it is!", b"def f(x): return x\n" * 20, b"= 7"]
IDS = [list(text) for text in TEXTS]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "f16.gguf", hidden=64, mlp=96, head_dim=16)


@pytest.fixture(scope="module")
def matrix(model: Path) -> Path:
    out = model.with_name("importance.gguf")
    importance.compute(model, IDS, out, threads=1)
    return out


def weights(model: Path, name: str) -> np.ndarray:
    return next(tensor.data for tensor in gguf.GGUFReader(model).tensors if tensor.name == name).astype(np.float32)


def test_the_first_layer_sees_the_normalised_embeddings(model: Path, matrix: Path) -> None:
    embedded = weights(model, "token_embd.weight")[[index for text in IDS for index in text]]
    scale = np.sqrt((embedded**2).mean(axis=1, keepdims=True) + 1e-6)
    seen = embedded / scale * weights(model, "blk.0.attn_norm.weight")
    found = importance.read(matrix)
    for name in ("attn_q", "attn_k", "attn_v"):
        np.testing.assert_allclose(found[f"blk.0.{name}.weight"], (seen**2).mean(axis=0), rtol=1e-4)


def test_every_weight_of_every_layer_is_there_the_last_one_too(model: Path, matrix: Path) -> None:
    names = [f"blk.{layer}.{kind}.weight" for layer in (0, 1) for kind in "attn_q attn_k attn_v attn_output".split()]
    names += [f"blk.{layer}.{kind}.weight" for layer in (0, 1) for kind in ("ffn_gate", "ffn_up", "ffn_down")]
    found = importance.read(matrix)
    assert sorted(found) == sorted(names) == sorted(importance.block_weights(read_gguf(model)))
    assert len(found["blk.1.ffn_down.weight"]) == 96 and len(found["blk.1.ffn_up.weight"]) == 64
    np.testing.assert_array_equal(found["blk.1.ffn_up.weight"], found["blk.1.ffn_gate.weight"])


def test_the_file_is_what_llama_cpps_tools_write(matrix: Path) -> None:
    reader = gguf.GGUFReader(matrix)
    assert reader.get_field("general.type").contents() == "imatrix"
    assert reader.get_field("imatrix.datasets").contents() == ["judging prompts and judgements"]
    assert reader.get_field("imatrix.chunk_size").contents() == 512
    assert reader.get_field("general.architecture") is None
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    counts = tensors["blk.0.attn_q.weight.counts"]
    assert counts.data.tolist() == [sum(len(text) for text in IDS)]
    sums = tensors["blk.0.attn_q.weight.in_sum2"].data
    np.testing.assert_array_equal(sums / counts.data, importance.read(matrix)["blk.0.attn_q.weight"])


def test_texts_evaluated_together_see_only_themselves(model: Path, matrix: Path, tmp_path: Path) -> None:
    together = importance.read(matrix)
    alone = [importance.read(importance.compute(model, [ids], tmp_path / "one", threads=1).path) for ids in IDS]
    for name in together:
        mean = sum(len(ids) * found[name] for ids, found in zip(IDS, alone, strict=True)) / sum(map(len, IDS))
        np.testing.assert_allclose(together[name], mean, rtol=2e-3)


def test_a_text_longer_than_a_step_is_read_on_with_its_beginning_in_mind(model: Path, tmp_path: Path) -> None:
    ids = [list(bytes(range(32, 127)) * 4), list(b"short")]
    calls: list[tuple[int, int]] = []
    progress = lambda done, of: calls.append((done, of))  # noqa: E731
    whole = importance.read(importance.compute(model, ids, tmp_path / "whole", threads=1).path)
    found = importance.compute(model, ids, tmp_path / "steps", threads=1, chunk=128, progress=progress)
    assert (found.tensors, found.tokens) == (14, 385) and calls == [(128, 385), (256, 385), (380, 385), (385, 385)]
    for name, values in importance.read(found.path).items():
        np.testing.assert_allclose(values, whole[name], rtol=2e-3)


@pytest.mark.parametrize(
    ("sequences", "words"),
    [
        ([], "no text"),
        ([[1], []], "no text"),
        ([[1, 320]], "320 tokens"),
        ([[-1]], "-1"),
        ([[1] * 2049], "2049 tokens does not fit the 2048"),
    ],
)
def test_what_can_not_be_evaluated_is_refused_before_the_model_is_loaded(
    model: Path, tmp_path: Path, sequences: list[list[int]], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        importance.compute(model, sequences, tmp_path / "out", threads=1)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_numbers_are_named(tmp_path: Path) -> None:
    spoilt = write_model(tmp_path / "nan.gguf", hidden=64, mlp=96, head_dim=16, spoil={"blk.0.ffn_up.weight": np.nan})
    with pytest.raises(UserError, match=r"inputs of blk\.0\.ffn_down\.weight are not numbers"):
        importance.compute(spoilt, IDS, tmp_path / "out", threads=1)
    assert [path.name for path in tmp_path.iterdir()] == ["nan.gguf"]


def test_an_interruption_leaves_nothing_and_can_be_tried_again(model: Path, tmp_path: Path) -> None:
    def stop(done: int, of: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        importance.compute(model, IDS, tmp_path / "out", threads=1, progress=stop)
    assert list(tmp_path.iterdir()) == []
    importance.compute(model, IDS, tmp_path / "out", threads=1)


def test_an_error_in_the_callback_comes_out(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: object, address: int) -> bool:
        raise ZeroDivisionError

    monkeypatch.setattr(importance._Collector, "_take", broken)
    with pytest.raises(ZeroDivisionError):
        importance.compute(model, IDS, tmp_path / "out", threads=1)


def test_a_llama_cpp_with_other_structures_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importance, "_OBJECT_BYTES", 40)
    with pytest.raises(UserError, match="in a form unknown here"):
        importance.compute(model, IDS, tmp_path / "out", threads=1)


def test_the_old_form_is_read(tmp_path: Path) -> None:
    """Two calls whose means sum to (2, 6): a mean of (1, 3). Then one weight without calls, as it stands."""
    old = struct.pack("<i", 2)
    for name, calls, values in ((b"blk.0.attn_q.weight", 2, (2.0, 6.0)), (b"x", 0, (5.0,))):
        old += struct.pack("<i", len(name)) + name + struct.pack(f"<ii{len(values)}f", calls, len(values), *values)
    path = tmp_path / "imatrix.dat"
    path.write_bytes(old + struct.pack("<ii", 2, 4) + b"wiki")
    found = importance.read(path)
    assert {name: values.tolist() for name, values in found.items()} == {"blk.0.attn_q.weight": [1, 3], "x": [5]}
    for length in range(4, len(old)):
        path.write_bytes(old[:length])
        with pytest.raises(UserError, match="not a sound importance matrix: it ends inside"):
            importance.read(path)


def test_a_damaged_matrix_is_refused(matrix: Path, tmp_path: Path) -> None:
    sound, path = matrix.read_bytes(), tmp_path / "damaged"
    for length in range(0, len(sound) - 32, 501):
        path.write_bytes(sound[:length])
        with pytest.raises(UserError):
            importance.read(path)
    place = read_gguf(matrix).tensor("blk.0.attn_q.weight.in_sum2").offset
    for value in (float("nan"), float("inf"), -1.0):
        path.write_bytes(sound[:place] + struct.pack("<f", value) + sound[place + 4 :])
        with pytest.raises(UserError, match=r"blk\.0\.attn_q\.weight holds values"):
            importance.read(path)
    path.write_bytes(sound.replace(b"blk.0.attn_q.weight.counts", b"blk.0.attn_q.weight.counte"))
    with pytest.raises(UserError, match="sums without counts"):
        importance.read(path)


def test_a_file_that_is_no_matrix_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no importance matrix"):
        importance.read(model)
    with pytest.raises(UserError, match="is not a file"):
        importance.read(tmp_path)


def test_a_matrix_of_another_model_is_refused(model: Path, matrix: Path, tmp_path: Path) -> None:
    importance.check_fits(matrix, read_gguf(model))
    cases = {
        "wider": ({"hidden": 128, "mlp": 96, "head_dim": 16}, "64 channels there, 128 in"),
        "deeper": ({"hidden": 64, "mlp": 96, "head_dim": 16, "layers": 3}, "lacks 7 weights"),
        "flatter": ({"hidden": 64, "mlp": 96, "head_dim": 16, "layers": 1}, "has no tensor"),
    }
    for name, (shape, words) in cases.items():
        other = write_model(tmp_path / name, **shape)
        with pytest.raises(UserError, match=words):
            importance.check_fits(matrix, read_gguf(other))


def test_a_matrix_that_covers_the_head_too_fits_a_model_with_tied_embeddings(tmp_path: Path) -> None:
    """llama.cpp's tool has `--process-output`; a model with tied embeddings has no `output.weight`."""
    model = write_model(tmp_path / "one", hidden=64, mlp=96, head_dim=16, layers=1)
    names = [*importance.block_weights(read_gguf(model)), "output.weight"]
    data = struct.pack("<i", len(names))
    for name in names:
        count = 96 if "ffn_down" in name else 64
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack(f"<ii{count}f", 1, count, *[1.0] * count)
    (tmp_path / "old.dat").write_bytes(data)
    importance.check_fits(tmp_path / "old.dat", read_gguf(model))


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_llama_cpps_own_tool_finds_the_same(tmp_path: Path, tied: bool) -> None:
    program = tool("imatrix")
    model = write_model(tmp_path / "f16.gguf", layers=4, tied=tied)
    words = (
        "the judge reads a prompt and a response , writes a rubric , and scores from one to ten . <|im_end|>\n".split(
            " "
        )
    )
    text = " ".join(np.random.default_rng(3).choice(words, 900))
    (tmp_path / "text").write_text(text)
    ids = [index for part in text.split("<|im_end|>") for index in [258, *part.encode()]][1:]
    chunks = [ids[start : start + 512] for start in range(0, len(ids) - 511, 512)]
    importance.compute(model, chunks, tmp_path / "ours", threads=1)
    ours = importance.read(tmp_path / "ours")
    for name, batch in (("tool.gguf", "512"), ("tool.dat", "512"), ("together.gguf", "2048")):
        arguments = [str(model), str(tmp_path / "text"), str(tmp_path / name), "512", batch]
        subprocess.run([str(program), *arguments], check=True, capture_output=True)
        theirs = importance.read(tmp_path / name)
        assert set(ours) == set(theirs)
        difference = np.concatenate([np.abs(ours[key] - theirs[key]) / theirs[key] for key in ours])
        print(f"tied={tied} {name}: median {np.median(difference):.2e}, worst {difference.max():.2e}")
        assert np.median(difference) < 0.01 and difference.max() < 0.05
    assert importance.source_of(tmp_path / "tool.gguf") == (str(tmp_path / "text"), len(chunks))
