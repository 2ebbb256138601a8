"""The model card: what is known stands in it, what is not is left out, and no text from outside breaks it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from patarm_lite.prompts import Protocol
from patarm_lite.quantize.card import UNKNOWN_LICENCE, CardFile, MergeFigure, card

HASH = "0123456789abcdef" * 4
PARITY: dict[str, Any] = {
    "strings": 2461,
    "tokens_equal": True,
    "prompts": 84,
    "template_equal": True,
    "template_is_protocol": True,
    "logits": "truncated",
    "layers": [0, 1, 27],
    "weights_compared": 275,
    "max_logit_diff": 4e-5,
    "logit_std": 2.0,
    "rounding": 0.0,
    "positions": 256,
    "top1_equal": True,
    "seconds": 9.1,
}


def small(**changes: Any) -> str:
    return card(**{"name": "judge", "version": "0.1.0", "protocol": Protocol(), "context": 4096, **changes})


def front_matter(text: str) -> dict[str, Any]:
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


def test_what_nobody_measured_is_not_in_the_card() -> None:
    text = small()
    for word in ("Fidelity", "Parity", "Importance", "merged", "Files", "How to run", "Base model", "Training data"):
        assert word not in text, word
    assert "None" not in text and "nan" not in text
    assert "license" not in front_matter(text) and "base_model" not in front_matter(text)
    assert "No licence has been chosen" in text


def test_a_full_card_holds_every_figure_that_was_given() -> None:
    text = small(
        files=[CardFile("judge-q8_0.gguf", 639_446_688, HASH, "8 bits a weight"), CardFile("Modelfile", 1900, HASH)],
        about={
            "name": "tiny",
            "method": "par",
            "seed": 3,
            "parameters": 1_720_574_976,
            "base": {"name": "Qwen/Qwen3-1.7B", "commit": "70d244cc"},
            "recipe_sha256": "ab12",
            "data": {"train": 2000, "sha256_train": "cd34"},
            "sources": ["data/gsm8k_pairs.jsonl.gz", "Anthropic/hh-rlhf", "mine.jsonl"],
            "versions": {"torch": "2.13.0"},
        },
        fidelity="| type | accuracy |\n|---|---|\n| q8_0 | 0.944 |",
        parity=PARITY,
        importance="64 held-in prompts and the judge's own judgements, 51,200 tokens",
        merges=[
            MergeFigure("original", 0.91, 0.89, 0.93, 200, False),
            MergeFigure("dequantized", 0.925, 0.90, 0.94, 200, True),
        ],
    )
    front = front_matter(text)
    assert front["license"] == "apache-2.0" and front["base_model"] == ["Qwen/Qwen3-1.7B"]
    assert front["library_name"] == "gguf" and "llm-as-a-judge" in front["tags"]
    for wanted in (
        "1,720,574,976 parameters",
        "| `judge-q8_0.gguf` | 639.4 MB | 8 bits a weight | `" + HASH + "` |",
        "| q8_0 | 0.944 |",
        "2461 hard strings and 84 judging prompts",
        "a copy of layers 0, 1, 27 with embedding and head (275 tensors",
        "largest difference 4e-05 over 256 positions, 2e-05 of their standard deviation (2)",
        "| into the dequantized 4-bit base | 0.925 (0.900 to 0.940) | 200 | yes |",
        "| into the 16-bit original | 0.910 (0.890 to 0.930) | 200 |  |",
        "| `data/gsm8k_pairs.jsonl.gz` | MIT | openai/grade-school-math |",
        "| `Anthropic/hh-rlhf` | MIT | anthropics/hh-rlhf | holds offensive text |",
        "| `mine.jsonl` | " + UNKNOWN_LICENCE + " |",
        "51,200 tokens",
        "| base commit | `70d244cc` |",
        "seed 3",
    ):
        assert wanted in text, wanted
    assert "Rounding the weights" not in text, "nothing was rounded"


def test_the_arena_needs_no_licence_and_an_owners_choice_stands_first() -> None:
    text = small(about={"base": {"name": "arena"}, "sources": ["arena"]}, licence="cc-by-4.0")
    assert front_matter(text)["license"] == "cc-by-4.0" and "base_model" not in front_matter(text)
    assert "| `arena` | none needed |" in text and "Trained from scratch" in text


def test_a_template_that_renders_another_prompt_is_warned_of() -> None:
    assert "does **not** render the prompt" in small(parity={**PARITY, "template_is_protocol": False})
    assert "has no chat template" in small(parity={**PARITY, "template_equal": None, "template_is_protocol": False})


def test_a_stock_model_is_called_one() -> None:
    assert "not trained to this protocol" in small(trained=False)
    assert "not trained to this protocol" not in small()


def test_text_from_outside_breaks_neither_the_front_matter_nor_a_table() -> None:
    hostile = 'x"\n---\nlicense: mit\n| a | <img src=x> [l](http://e) `c` \x1b[31m\u202e'
    text = small(
        name=hostile,
        about={"name": hostile, "base": {"name": hostile, "commit": hostile}, "sources": [hostile], "method": hostile},
        files=[CardFile(hostile, 5, hostile, hostile)],
        importance=hostile,
        licence=hostile,
    )
    assert front_matter(text)["license"] == hostile
    body = text.split("---\n", 2)[2]
    assert "\x1b" not in text and "\u202e" not in text
    assert "<img" not in body.replace("\\<", "") and "](" not in body.replace("\\]", "") and "\nlicense" not in body
    rows = [line for line in body.splitlines() if line.startswith("| x")]
    assert rows
    for row in rows:
        assert len(re.findall(r"(?<!\\)\|", row)) == 5, row
    assert "not computed" in body, "what is no hash is not shown as one"


@pytest.mark.parametrize("thinking", [False, True])
def test_the_commands_name_the_file_the_context_and_the_thinking_of_the_protocol(thinking: bool) -> None:
    text = small(
        files=[CardFile("README.md", 1, HASH), CardFile("my judge-q4_k_m.gguf", 1, HASH)],
        protocol=Protocol(thinking=thinking),
        context=1234,
    )
    said = "true" if thinking else "false"
    assert (
        f"--model 'my judge-q4_k_m.gguf' --n_ctx 1234 --chat_template_kwargs '{{\"enable_thinking\": {said}}}'" in text
    )
    assert 'Path("my judge-q4_k_m.gguf")' in text and "context=1234" in text
    assert "Ollama (not run by us)" in text


def test_the_licences_of_known_data_are_those_of_the_list_they_came_with(shared: Path) -> None:
    """Each line of the shared data's own list whose source the card knows names the same licence."""
    from patarm_lite.quantize.card import KNOWN_DATA

    listed = (shared / "data" / "DATA.md").read_text(encoding="utf-8")
    for _, origin, licence, _ in KNOWN_DATA:
        rows = [line for line in listed.splitlines() if line.startswith("|") and f"| {origin} @" in line]
        assert rows, origin
        assert any(licence in row.split("|")[6] for row in rows), (origin, licence)
