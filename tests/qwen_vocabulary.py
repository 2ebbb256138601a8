"""Qwen's real vocabulary as a Hugging Face tokenizer, built from the GGUF vocabulary among the shared materials.

`PATARM_SHARED` names the folder of these materials; without it, `../shared` beside the checkout. Two tokenizers:

- `qwen3_tokenizer()`: byte-pair merges of the file, with the 26 added tokens that Qwen3 has at ids 151643 to 151668
  (the file is Qwen2's, where most of these places are unused);
- `qwen2_file_tokenizer()`: added tokens as the file itself types them, 290 unused places as user-defined tokens
  `[PAD151646]` and on included.

The file's metadata is read here by hand: the `gguf` package takes ten seconds for it.
"""

from __future__ import annotations

import functools
import os
import struct
from pathlib import Path
from typing import Any

SHARED = Path(os.environ.get("PATARM_SHARED", Path(__file__).resolve().parents[2] / "shared"))
VOCABULARY = SHARED / "models" / "ggml-vocab-qwen2.gguf"
TEMPLATE = SHARED / "models" / "Qwen-Qwen3-0.6B.jinja"
MISSING = f"the shared materials are not at {SHARED}; set PATARM_SHARED" if not SHARED.is_dir() else ""
"""Why a test that needs the real vocabulary is skipped: only where the whole folder is absent."""

NORMAL, CONTROL = 1, 3
FIRST_ADDED = 151_643
CONTROL_TOKENS = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|>"
    " <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()
USER_DEFINED_TOKENS = (
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>"
    " <tool_response> </tool_response> <think> </think>"
).split()
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9


def gguf_metadata(path: Path) -> dict[str, Any]:
    """Key -> value of a GGUF file's metadata (version 2 or 3, little endian)."""
    data, place = path.read_bytes(), 0

    def number(form: str) -> Any:
        nonlocal place
        (value,) = struct.unpack_from(form, data, place)
        place += struct.calcsize(form)
        return value

    def string() -> str:
        nonlocal place
        length = number("<Q")
        place += length
        return data[place - length : place].decode("utf-8")

    def value(kind: int) -> Any:
        if kind == _STRING:
            return string()
        if kind == _ARRAY:
            item, count = number("<I"), number("<Q")
            return [value(item) for _ in range(count)]
        return number(_NUMBERS[kind])

    assert data[:4] == b"GGUF", path
    place = 4
    assert number("<I") in (2, 3), path
    number("<Q")  # tensors
    return {string(): value(number("<I")) for _ in range(number("<Q"))}


@functools.cache
def _file() -> dict[str, Any]:
    return gguf_metadata(VOCABULARY)


def _tokenizer(control: list[str], user_defined: list[str]) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens, types = _file()["tokenizer.ggml.tokens"][:FIRST_ADDED], _file()["tokenizer.ggml.token_type"][:FIRST_ADDED]
    assert set(types) == {NORMAL}
    merges = [tuple(merge.split(" ")) for merge in _file()["tokenizer.ggml.merges"]]
    core = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    core.add_tokens([AddedToken(token, normalized=False, special=False) for token in user_defined])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")


@functools.cache
def qwen3_tokenizer() -> Any:
    """Qwen3's tokenizer with Qwen3's chat template."""
    tokenizer = _tokenizer(CONTROL_TOKENS, USER_DEFINED_TOKENS)
    tokenizer.chat_template = TEMPLATE.read_text(encoding="utf-8")
    return tokenizer


@functools.cache
def qwen2_file_tokenizer() -> Any:
    """The tokenizer that the file describes, unused places included."""
    tokens, types = _file()["tokenizer.ggml.tokens"][FIRST_ADDED:], _file()["tokenizer.ggml.token_type"][FIRST_ADDED:]
    count = types.count(CONTROL)
    assert types[:count] == [CONTROL] * count
    return _tokenizer(tokens[:count], tokens[count:])
