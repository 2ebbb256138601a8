"""A Qwen tokenizer's files as the vocabulary of a GGUF file. Reads `tokenizer.json` itself, without `transformers`.

llama.cpp knows a tokenizer by the name of its pre-tokenizer and brings the splitting rule itself. So before `qwen2` is
written every part of the tokenizer is compared with what llama.cpp does under that name: a tokenizer that differs in
anything would give other ids than the trainer saw, and is refused. One difference is left to the caller: llama.cpp
does not apply the NFC normaliser, texts must come normalised.

Types of tokens follow llama.cpp's own converter: ids without a token are `[PADi]` and unused, added tokens are control
tokens if they are marked special *or look special* (`<|fim_prefix|>`), otherwise user-defined.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patarm_lite.errors import UserError

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Token types of a GGUF file."""

PRE_TOKENIZER = "qwen2"
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen2's and Qwen3's splitting rule: what llama.cpp does under the name `qwen2`."""

SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
"""Special tokens that a GGUF file may name, in the order of llama.cpp's own converter."""

_LOOKS_SPECIAL = re.compile(r"<\|.*\|>|<｜.*｜>|<unused.*>|<pad>|<mask>|<2mass>|\[@BOS@\]", re.DOTALL)
_PLAIN_BPE = {
    "type": ("BPE",),
    "dropout": (None,),
    "unk_token": (None,),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "byte_fallback": (None, False),
    "ignore_merges": (None, False),
}
"""Fields of the tokenizer's model and the values with which it is the plain byte-level BPE of llama.cpp."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer.

    `tokens` and `types`: by id, as many as the embedding has rows. `merges`: `left right`, best first. `special`:
    `eos`, `pad`, ... -> id. `template`: the chat template, or none.
    """

    tokens: list[str]
    types: list[int]
    merges: list[str]
    special: dict[str, int]
    template: str | None


def read_vocabulary(folder: Path, size: int) -> Vocabulary:
    """Read a model folder's tokenizer.

    Args:
        folder: holds tokenizer.json, and usually tokenizer_config.json, chat_template.jinja and config.json.
        size: rows of the embedding.

    Raises:
        UserError: no tokenizer, a damaged one, or one that llama.cpp would not imitate.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{folder} has no tokenizer.json; copy the tokenizer files of the judge's base model into it")
    tokenizer = read_json(path)
    config = read_json(folder / "tokenizer_config.json", missing_ok=True)
    try:
        _check_imitable(tokenizer, config)
        tokens, types = _tokens(tokenizer, config, size)
        merges = [_merge(merge) for merge in tokenizer["model"]["merges"]]
        special = _special(folder, tokenizer, config, size)
        template = _template(folder, config)
    except _Unfit as error:
        raise UserError(f"{path}: {error}; only tokenizers of the Qwen2 and Qwen3 family can be exported") from None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path}, or a file beside it, is damaged ({error!r}); get the file again") from None
    if "eos" not in special:
        raise UserError(f"{folder} names no end token (eos_token in tokenizer_config.json); generation would never end")
    return Vocabulary(tokens, types, merges, special, template)


def read_json(path: Path, missing_ok: bool = False) -> dict[str, Any]:
    """A JSON file that holds an object; `{}` for a file that may be missing and is.

    Raises:
        UserError: missing, not JSON, or not an object.
    """
    if missing_ok and not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path.parent} has no {path.name}; give a model's folder") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); get the file again") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a JSON object; get the file again")
    return found


class _Unfit(Exception):
    """In what a tokenizer differs from what llama.cpp does, in words."""


def _check_imitable(tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
    model = tokenizer["model"]
    for field, values in _PLAIN_BPE.items():
        if model.get(field) not in values:
            raise _Unfit(f"its model has {field} {model.get(field)!r} where {values[0]!r} is expected")
    if _flat(tokenizer.get("normalizer"), "normalizers") != [{"type": "NFC"}]:
        raise _Unfit(f"its normalizer is {_short(tokenizer.get('normalizer'))}, not NFC")
    steps = _flat(tokenizer.get("pre_tokenizer"), "pretokenizers")
    split, byte_level = [*steps, {}, {}][:2]
    pattern = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
    if split != pattern:
        raise _Unfit(f"its pre-tokenizer splits by {_short(split)}, not by Qwen2's expression")
    wanted = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    if {key: byte_level.get(key) for key in wanted} != wanted or len(steps) > 2:
        raise _Unfit(f"its pre-tokenizer goes on with {_short(byte_level)}, not with plain byte level")
    for processor in _flat(tokenizer.get("post_processor"), "processors"):
        template = processor.get("single", []) if processor.get("type") == "TemplateProcessing" else []
        if processor.get("type") not in ("ByteLevel", "TemplateProcessing") or any(
            "Sequence" not in p for p in template
        ):
            raise _Unfit(f"it adds tokens of its own to a text ({_short(processor)})")
    for key in ("add_bos_token", "add_eos_token"):
        if config.get(key):
            raise _Unfit(f"tokenizer_config.json has {key} {config[key]!r}, which adds a token to every text")


def _flat(part: Any, key: str) -> list[dict[str, Any]]:
    """The members of a `Sequence`, or the part itself."""
    if part is None:
        return []
    return part[key] if part.get("type") == "Sequence" else [part]


def _short(part: Any) -> str:
    text = json.dumps(part, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _tokens(tokenizer: dict[str, Any], config: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    by_id: dict[int, tuple[str, int]] = {id_: (token, NORMAL) for token, id_ in tokenizer["model"]["vocab"].items()}
    if len(by_id) < len(tokenizer["model"]["vocab"]):
        raise _Unfit("two of its tokens have the same id")
    _check_byte_level(by_id, {token["id"] for token in tokenizer["added_tokens"]})
    for id_, token in _added(tokenizer, config).items():
        content = token["content"]
        if id_ in by_id and by_id[id_][0] != content:
            raise _Unfit(f"id {id_} is both {by_id[id_][0]!r} and the added token {content!r}")
        control = token.get("special") or _LOOKS_SPECIAL.fullmatch(content)
        by_id[id_] = content, CONTROL if control else USER_DEFINED
    if by_id and max(by_id) >= size:
        raise _Unfit(f"its token {by_id[max(by_id)][0]!r} has id {max(by_id)}, and the embedding has {size} rows")
    rows = [by_id.get(id_, (f"[PAD{id_}]", UNUSED)) for id_ in range(size)]
    tokens = [token for token, _ in rows]
    if len(set(tokens)) < size:
        ((twice, _),) = Counter(tokens).most_common(1)
        raise _Unfit(f"the token {twice!r} has two ids")
    return tokens, [kind for _, kind in rows]


def _check_byte_level(by_id: dict[int, tuple[str, int]], added: set[int]) -> None:
    # the 256 characters that stand for bytes: printable Latin-1 for itself, all other bytes from U+0100 on
    byte_level = re.compile("[!-~¡-¬®-ÿĀ-Ń]+")
    for id_, (token, _) in by_id.items():
        if id_ not in added and not byte_level.fullmatch(token):
            raise _Unfit(f"its token {token!r} is not spelled in byte-level characters")


def _added(tokenizer: dict[str, Any], config: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Added tokens by id, those that only tokenizer_config.json knows (older folders) included."""
    found = {token["id"]: token for token in tokenizer["added_tokens"]}
    for text, token in config.get("added_tokens_decoder", {}).items():
        known = found.setdefault(int(text), token)
        if known["content"] != token["content"]:
            raise _Unfit(f"id {text} is {known['content']!r}, and {token['content']!r} in tokenizer_config.json")
    for token in found.values():
        for rule in ("single_word", "lstrip", "rstrip"):
            if token.get(rule):
                raise _Unfit(f"its added token {token['content']!r} matches by the rule {rule}, which llama.cpp lacks")
    return found


def _merge(merge: Any) -> str:
    pair = merge.split(" ") if isinstance(merge, str) else merge
    if len(pair) != 2 or any(not part or " " in part for part in pair):
        raise _Unfit(f"its merge {merge!r} is not a pair of tokens")
    return " ".join(pair)


def _special(folder: Path, tokenizer: dict[str, Any], config: dict[str, Any], size: int) -> dict[str, int]:
    """Special tokens as tokenizer_config.json names them, else as config.json numbers them."""
    added = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    model = read_json(folder / "config.json", missing_ok=True)
    found: dict[str, int] = {}
    for name in SPECIAL:
        token = config.get(f"{name}_token")
        content = token.get("content") if isinstance(token, dict) else token
        id_ = added.get(content, model.get(f"{name}_token_id"))
        if type(id_) is int and 0 <= id_ < size:
            found[name] = id_
    return found


def _template(folder: Path, config: dict[str, Any]) -> str | None:
    """The chat template that `transformers` would use: the file's before the one in tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        return next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    return template if isinstance(template, str) else None
