"""The parity gate, on real files: it lets a sound export pass and refuses every damaged one."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_qwen import write_model

from patarm_lite.gguf_file import read_gguf
from patarm_lite.prompts import Protocol
from patarm_lite.quantize.convert import convert
from patarm_lite.quantize.hard_strings import hard_strings
from patarm_lite.quantize.metadata import rewrite
from patarm_lite.quantize.widen import blocks, widen
from patarm_lite.records import Criterion, Turn

SHORT = Protocol(instructions=False)
RUBRIC = (Criterion("truth", "is right", 5),)


def parity(folder: Path, gguf: Path, work: Path, **options: Any) -> Any:
    """The gate on a judge and the file made from it."""
    pytest.importorskip("llama_cpp")
    from patarm_lite.quantize.parity import JudgingText, check

    texts = [
        JudgingText((Turn("user", "Name a color, please."),), "The door is red.", "chat", RUBRIC, "<score>7</score>"),
        JudgingText((Turn("user", "2 + 2"),), "It is 4.\n\tno: ５", "math", RUBRIC, reference="4"),
    ]
    options = {"protocol": SHORT, "judging_prompts": texts, **options}
    return check(options.pop("trainer", folder), folder, gguf, work, **options)


@pytest.fixture(scope="session")
def arena_judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A judge of the arena with random weights: tied embeddings, three layers, weights in f32."""
    pytest.importorskip("torch")
    from conftest import little_tokenizer

    from patarm_lite import arena
    from patarm_lite.training.engine import save_judge

    tokenizer = little_tokenizer()
    model = arena.build_judge(tokenizer, hidden=32, layers=3, heads=2, mlp=64, seed=1)
    folder = tmp_path_factory.mktemp("arena") / "judge"
    save_judge(model, tokenizer, SHORT, "arena", folder)
    return folder


@pytest.fixture(scope="session")
def arena_file(arena_judge: Path) -> Path:
    return convert(arena_judge, arena_judge.parent / "arena.gguf").path


@pytest.fixture
def damaged(arena_file: Path, tmp_path: Path) -> Callable[..., Path]:
    """`damaged(key=value)`: a copy of the sound file with other metadata."""

    def make(changes: dict[str, Any] | None = None) -> Path:
        copy = tmp_path / "damaged.gguf"
        shutil.copyfile(arena_file, copy)
        if changes:
            rewrite(copy, changes)
        return copy

    return make


def nudge(path: Path, tensor: str, by: float) -> None:
    """Add to the first value of an f16 tensor in a file."""
    place = read_gguf(path).tensor(tensor)
    assert place.type == "F16"
    with path.open("r+b") as file:
        file.seek(place.offset)
        (value,) = struct.unpack("<e", file.read(2))
        file.seek(place.offset)
        file.write(struct.pack("<e", value + by))


def test_a_sound_export_passes_and_its_figures_say_what_was_compared(
    arena_judge: Path, arena_file: Path, tmp_path: Path
) -> None:
    found = parity(arena_judge, arena_file, tmp_path / "work")
    assert found.tokens_equal and found.template_equal and found.template_is_protocol and found.top1_equal
    assert found.logits == "whole" and found.layers == [0, 1, 2] and found.weights_compared == 0
    assert found.strings >= 1000 and found.prompts == 2 + 4 and found.positions >= 200
    assert 0 < found.max_logit_diff < 1e-3 * found.logit_std
    assert found.max_logit_diff < found.rounding < 0.1, "f32 weights were rounded to f16, and that was measured apart"
    assert list((tmp_path / "work").iterdir()) == []


def test_where_memory_is_short_three_layers_run_and_the_weights_of_the_others_are_compared(
    arena_judge: Path, tmp_path: Path
) -> None:
    folder = write_model(tmp_path / "untied", tied=False, dtype="BF16", changes={"num_hidden_layers": 5})
    file = convert(folder, tmp_path / "untied.gguf").path
    found = parity(folder, file, tmp_path / "work", free_memory=0)
    assert found.logits == "truncated" and found.layers == [0, 1, 4]
    assert found.weights_compared == 2 * 11, "eleven tensors of each of layers 2 and 3"
    assert found.positions >= 200 and found.max_logit_diff < 1e-3 * found.logit_std
    assert not found.template_is_protocol, "its template opens no turn of the assistant"

    nudge(file, "blk.3.ffn_up.weight", 0.25)
    with pytest.raises(Exception, match=r"tensor 'blk\.3\.ffn_up\.weight' of .* does not hold the 'model\.layers\.3"):
        parity(folder, file, tmp_path / "work", free_memory=0)


def test_an_untied_model_of_four_layers_passes_whole(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "untied", tied=False, dtype="F16", changes={"num_hidden_layers": 4})
    found = parity(folder, convert(folder, tmp_path / "untied.gguf").path, tmp_path / "work")
    assert found.logits == "whole" and found.layers == [0, 1, 2, 3]
    assert found.rounding == 0, "f16 weights need no rounding"


@pytest.mark.parametrize("tensor", ["blk.1.attn_v.weight", "blk.2.ffn_down.weight", "token_embd.weight"])
def test_one_nudged_weight_fails(tensor: str, arena_judge: Path, damaged: Callable[..., Path], tmp_path: Path) -> None:
    file = damaged()
    nudge(file, tensor, 0.5)
    with pytest.raises(Exception, match=r"logits differ by up to .* the file does not hold this judge"):
        parity(arena_judge, file, tmp_path / "work")
    assert list((tmp_path / "work").iterdir()) == [], "the copy is removed after a failure too"


def test_another_rope_theta_fails(arena_judge: Path, damaged: Callable[..., Path], tmp_path: Path) -> None:
    file = damaged({"qwen3.rope.freq_base": 12_000.0})
    with pytest.raises(Exception, match="logits differ by up to"):
        parity(arena_judge, file, tmp_path / "work")


def test_another_norm_epsilon_fails(arena_judge: Path, damaged: Callable[..., Path], tmp_path: Path) -> None:
    file = damaged({"qwen3.attention.layer_norm_rms_epsilon": 2**-7})
    with pytest.raises(Exception, match="logits differ by up to"):
        parity(arena_judge, file, tmp_path / "work")


def test_two_swapped_merges_fail_by_name(
    arena_judge: Path, arena_file: Path, damaged: Callable[..., Path], tmp_path: Path
) -> None:
    merges = list(read_gguf(arena_file).metadata["tokenizer.ggml.merges"])
    swapped = [*merges[:5], merges[6], merges[5], *merges[7:]]
    with pytest.raises(Exception, match=r"merge 5 is '.*' for the trainer and '.*' in .*damaged\.gguf"):
        parity(arena_judge, damaged({"tokenizer.ggml.merges": swapped}), tmp_path / "work")


def test_another_splitting_rule_fails_on_a_hard_string(
    arena_judge: Path, damaged: Callable[..., Path], tmp_path: Path
) -> None:
    """The lists of tokens and merges are equal; the file only names the splitting rule of another family."""
    with pytest.raises(Exception, match=r"the text .* becomes \[.*\] in the trainer and \[.*\] in llama\.cpp"):
        parity(arena_judge, damaged({"tokenizer.ggml.pre": "gpt-2"}), tmp_path / "work")


def test_another_template_fails_and_says_where(
    arena_judge: Path, arena_file: Path, damaged: Callable[..., Path], tmp_path: Path
) -> None:
    template = read_gguf(arena_file).metadata["tokenizer.chat_template"]
    file = damaged({"tokenizer.chat_template": template.replace("user", "human").replace("assistant", "judge")})
    with pytest.raises(Exception, match=r"not the trained judge's: from character \d+ on it has 'judge.*'assistant"):
        parity(arena_judge, file, tmp_path / "work")


def test_another_end_token_fails(arena_judge: Path, damaged: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(Exception, match="the end token is 2 for the trainer and 0 in"):
        parity(arena_judge, damaged({"tokenizer.ggml.eos_token_id": 0}), tmp_path / "work")


def test_a_merged_folder_with_another_tokenizer_fails(arena_judge: Path, arena_file: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    shutil.copytree(arena_judge, merged)
    described = json.loads((merged / "tokenizer.json").read_text(encoding="utf-8"))
    described["model"]["merges"].reverse()
    (merged / "tokenizer.json").write_text(json.dumps(described), encoding="utf-8")
    with pytest.raises(Exception, match=r"becomes \[.*\] in the trainer and \[.*\] in the merged folder"):
        parity(merged, arena_file, tmp_path / "work", trainer=arena_judge)


def test_a_quantized_file_is_not_what_the_gate_is_for(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    file = convert(folder, tmp_path / "model.gguf").path
    header = bytearray(file.read_bytes())
    place = header.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight") + 4 + 16
    header[place : place + 4] = struct.pack("<I", 8)  # Q8_0: smaller than f16, so the file still holds it
    file.write_bytes(header)
    with pytest.raises(
        Exception, match=r"'blk\.0\.attn_q\.weight' of .* is of type Q8_0; parity is measured on 16-bit"
    ):
        parity(folder, file, tmp_path / "work")


def test_the_errors_of_the_gate_are_one_line_for_the_user(
    arena_judge: Path, damaged: Callable[..., Path], tmp_path: Path
) -> None:
    from patarm_lite.errors import UserError
    from patarm_lite.quantize.parity import ParityError

    with pytest.raises(ParityError) as caught:
        parity(arena_judge, damaged({"tokenizer.ggml.eos_token_id": 0}), tmp_path / "work")
    assert isinstance(caught.value, UserError) and "\n" not in str(caught.value)


def test_hard_strings_are_many_different_always_the_same_and_of_every_kind() -> None:
    found = hard_strings(["<|im_end|>"], ["=" * 48])
    assert len(found) == len(set(found)) >= 1000
    assert found == hard_strings(["<|im_end|>"], ["=" * 48])
    for wanted in (
        "e\u0301",  # decomposed
        "\u212b",  # a letter that NFC replaces
        " " * 300,
        "\r\n" * 8,
        "👨‍👩‍👧‍👦",
        "٠١٢٣٤٥٦٧٨٩" * 12,
        "<|im_end|>",
        "<|im_end|",
        "a<|im_end|>b",
        "=" * 96,
        "\x00" * 5,
        "\ud800",
        "\u202e",
    ):
        assert wanted in found or any(wanted in string for string in found), wanted


def test_a_widened_copy_holds_the_files_own_numbers_and_says_its_own_layers(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", dtype="BF16", changes={"num_hidden_layers": 4})
    file = read_gguf(convert(folder, tmp_path / "model.gguf").path)
    widen(file, tmp_path / "copy.gguf", [0, 3])
    copy = read_gguf(tmp_path / "copy.gguf")
    assert copy.metadata == {**file.metadata, "qwen3.block_count": 2}
    assert {tensor.type for tensor in copy.tensors} == {"F32"}
    with file.path.open("rb") as one, copy.path.open("rb") as other:
        for there, here in (("blk.3.ffn_up.weight", "blk.1.ffn_up.weight"), ("output_norm.weight",) * 2):
            wanted = np.concatenate(list(blocks(one, file.tensor(there))))
            assert np.array_equal(wanted, np.concatenate(list(blocks(other, copy.tensor(here)))))


@pytest.mark.slow
def test_qwens_own_vocabulary_passes(tmp_path: Path, shared: Path) -> None:
    from qwen_vocabulary import qwen3_tokenizer

    folder = write_model(tmp_path / "qwen", tied=False, dtype="BF16", changes={"vocab_size": 151_936})
    tokenizer = qwen3_tokenizer()
    for path in folder.glob("*token*"):
        path.unlink()
    (folder / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["eos_token_id"] = tokenizer.eos_token_id
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    found = parity(folder, convert(folder, tmp_path / "qwen.gguf").path, tmp_path / "work", protocol=Protocol())
    assert found.template_equal and found.template_is_protocol and found.strings > 3000
