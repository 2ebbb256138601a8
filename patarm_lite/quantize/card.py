"""The model card of an exported judge: README.md beside its files.

Only what is known is written: a figure that nobody measured, a hash that nobody computed and a licence that nobody
stated are left out or said to be unknown. Texts from outside (names of data, bases and files) are escaped.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from patarm_lite.prompts import Protocol

TAGS = ("gguf", "llama-cpp", "llm-as-a-judge", "reward-model", "patarm-lite")
KNOWN_DATA = (
    ("hh-rlhf|hh_rlhf|hh_harmless", "anthropics/hh-rlhf", "MIT", "holds offensive text"),
    ("gsm8k|grade-school-math", "openai/grade-school-math", "MIT", ""),
    ("debugbench", "thunlp/DebugBench", "Apache-2.0", "solutions come from users of LeetCode"),
    ("pandalm", "WeOpenML/PandaLM", "Apache-2.0", ""),
    ("autoj|auto-j", "prometheus-eval/prometheus-eval", "Apache-2.0", "its origin GAIR-NLP/auto-j states no licence"),
    ("llmbar", "princeton-nlp/LLMBar", "MIT", "a benchmark: don't report it for this judge"),
    ("rm-bench|rmbench", "THU-KEG/RM-Bench", "ODC-BY", "a benchmark: don't report it for this judge"),
    ("judgebench", "ScalerLab/JudgeBench", "MIT", "a benchmark: don't report it for this judge"),
)
"""Pattern of a pair set's name, where it comes from, its licence as stated there or on its hub page, what to mind."""
KNOWN_BASES = (("Qwen/Qwen3-", "apache-2.0"),)
"""Beginning of a base model's hub id -> its licence as an identifier of the hub."""
UNKNOWN_LICENCE = "licence not known: find out before you publish"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True, slots=True)
class CardFile:
    """A file of the export. `what`: in a few words."""

    name: str
    bytes: int
    sha256: str
    what: str = ""


@dataclass(frozen=True, slots=True)
class MergeFigure:
    """Accuracy on held-out pairs of one way of merging an adapter, with its 95 % interval."""

    onto: str
    accuracy: float
    low: float
    high: float
    n: int
    kept: bool


def card(
    *,
    name: str,
    version: str,
    protocol: Protocol,
    context: int,
    files: Sequence[CardFile] = (),
    about: Mapping[str, Any] | None = None,
    trained: bool = True,
    fidelity: str | None = None,
    parity: Mapping[str, Any] | None = None,
    importance: str | None = None,
    merges: Sequence[MergeFigure] = (),
    licence: str | None = None,
) -> str:
    """The card as Markdown with YAML front matter.

    Args:
        name: what the judge is called.
        version: patarm-lite's.
        context: tokens of a judging prompt and its judgement together.
        files: in the order of their table; the first GGUF stands in the examples.
        about: what the run says of the judge (`Source.about`): name, method, seed, parameters, base, sources, data,
            recipe_sha256.
        trained: whether it was trained to the protocol.
        fidelity: the table of `fidelity.table`.
        parity: the figures of `parity.Parity` as a dict.
        importance: a sentence on what the importance matrix was made of.
        merges: the ways an adapter was merged, where they were compared.
        licence: the judge's own, where its owner chose one; else the base's stands in the front matter where known.
    """
    known = dict(about or {})
    base = _base_of(known)
    parts = [
        _front_matter(licence or _base_licence(base), base),
        f"# {_text(name)}",
        _what(known, base, protocol, trained),
        _files(files),
        _how_to_run(next((file.name for file in files if file.name.endswith(".gguf")), None), context, protocol),
        "" if fidelity is None else f"## Fidelity\n\n{fidelity.strip()}",
        _parity(parity),
        _merges(merges),
        "" if importance is None else f"## Importance matrix\n\n{_text(importance)}",
        _licences(licence, base, _sources(known)),
        _limits(protocol, trained),
        _origin(known, base, version),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


# --- escaping ---


def _text(text: object) -> str:
    """Text from outside as plain Markdown text on one line.

    >>> print(_text("a|b *c* <img>\\n# d"))
    a\\|b \\*c\\* \\<img\\> \\# d
    """
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return re.sub(r"([\\`*_{}\[\]<>()#|~!&$])", r"\\\1", line[:300])


def _code(text: object) -> str:
    """A name as code where it is plain, else as escaped text."""
    return f"`{text}`" if re.fullmatch(r"[\w.,:=+/@ -]{1,120}", str(text), re.ASCII) else _text(text)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join([_row(*head), _row(*["---"] * len(head)), *(_row(*row) for row in rows)])


# --- parts ---


def _front_matter(licence: str | None, base: str) -> str:
    """YAML in which every text is a JSON string, so that no text can break out of it."""
    lines = ["---"]
    if licence is not None:
        lines.append(f"license: {json.dumps(licence)}")
    if _HUB_ID.fullmatch(base):
        lines += ["base_model:", f"- {json.dumps(base)}"]
    lines += ["library_name: gguf", "pipeline_tag: text-generation", "tags:", *(f"- {tag}" for tag in TAGS), "---"]
    return "\n".join(lines)


def _what(about: Mapping[str, Any], base: str, protocol: Protocol, trained: bool) -> str:
    size = f" of {about['parameters']:,} parameters" if about.get("parameters") else ""
    text = (
        f"A judge{size} (a generative reward model): it reads a prompt and one response, writes a rubric fitted to the "
        "prompt, scores the response against it and ends with one score from 1 to 10. Protocol "
        f"{_code(protocol.name)}{', thinking first' if protocol.thinking else ''}."
    )
    if not trained:
        return text + " **It was not trained to this protocol**: a stock model, asked to judge."
    where = " from scratch" if base == "arena" else f" from {_code(base)}" if base else ""
    how = f" by the method {_code(about['method'])}" if about.get("method") else ""
    seed = f", seed {_text(about['seed'])}" if about.get("seed") is not None else ""
    return f"{text} Trained{where}{how}{seed} with patarm-lite."


def _files(files: Sequence[CardFile]) -> str:
    if not files:
        return ""
    rows = [(_code(file.name), _size(file.bytes), _text(file.what), f"`{_hash(file.sha256)}`") for file in files]
    return "## Files\n\n" + _table(("file", "size", "what", "SHA-256"), rows)


def _how_to_run(file: str | None, context: int, protocol: Protocol) -> str:
    if file is None:
        return ""
    quoted = shlex.quote(file)
    thinking = json.dumps({"enable_thinking": protocol.thinking})
    return _HOW.format(quoted=quoted, literal=json.dumps(file), context=context, thinking=shlex.quote(thinking)).strip()


_HOW = """
## How to run it

With patarm-lite (`pip install 'patarm-lite[judge]'`), which sends exact token ids and reads the verdict:

```python
from pathlib import Path

from patarm_lite.gguf_file import read_gguf
from patarm_lite.judge.description import read_description
from patarm_lite.judge.llamacpp import LlamaCpp
from patarm_lite.records import Turn

path = Path({literal})
judge = read_description(read_gguf(path).metadata)
with LlamaCpp.load(path, context={context}) as model:
    encoder = model.encoder(judge.protocol)
    prompt = [Turn("user", "Name a color")]
    ids = encoder.prompt_ids(prompt, "The door is red.", task="chat", rubric=judge.rubric("chat"))
    ((vote,),) = model.votes(
        [ids], 1, encoder=encoder, seed=1, temperature=0.0, decoding="constrained", max_tokens=512
    )
print(vote.verdict.score, vote.expected)
```

`patarm-lite inspect {quoted}` explains the file. Any server of the OpenAI kind runs it too; then the prompt is text:

```python
from patarm_lite.quantize.modelfile import documented_prompt

turn = documented_prompt(judge.protocol, "Name a color", "The door is red.", "chat", judge.rubric("chat"))
```

Send `turn` as the only user message with temperature 0, top_p 1, top_k 0, min_p 0, repeat_penalty 1 and enough
max_tokens, and read the answer with `patarm_lite.verdicts.parse`. Control tokens and tags in the texts to be judged are
broken by `documented_prompt`; a prompt that was built otherwise can be subverted by the text in it.

- llama-cpp-python: `python -m llama_cpp.server --model {quoted} --n_ctx {context} --chat_template_kwargs {thinking}`
- llama.cpp (not run by us): `llama-server -m {quoted} -c {context} --jinja --chat-template-kwargs {thinking}`
- Ollama (not run by us): `ollama create judge -f Modelfile`, with the `Modelfile` beside this file
"""


def _parity(parity: Mapping[str, Any] | None) -> str:
    if parity is None:
        return ""
    layers = ", ".join(str(layer) for layer in parity["layers"])
    ran = (
        "the whole model"
        if parity["logits"] == "whole"
        else f"a copy of layers {layers} with embedding and head ({parity['weights_compared']} tensors of the other "
        "layers compared value by value)"
    )
    deviations = parity["max_logit_diff"] / parity["logit_std"]
    lines = [
        f"- Token ids: equal between the trainer and llama.cpp on {parity['strings']} hard strings and "
        f"{parity['prompts']} judging prompts.",
        f"- Logits, torch against llama.cpp in f32, {ran}: largest difference {parity['max_logit_diff']:.2g} over "
        f"{parity['positions']} positions, {deviations:.1g} of their standard deviation ({parity['logit_std']:.3g}).",
    ]
    if parity["rounding"]:
        lines.append(f"- Rounding the weights to 16 bits changes a logit by at most {parity['rounding']:.2g}.")
    if parity["template_equal"] is None:
        lines.append("- The judge has no chat template: run it with patarm-lite, or with the Modelfile.")
    elif not parity["template_is_protocol"]:
        lines.append(
            "- The chat template is the trained judge's, but it does **not** render the prompt that the judge was "
            "trained on: use patarm-lite, or the plain completion of a server."
        )
    else:
        lines.append("- Chat template: equal, and it renders the prompt that the judge was trained on.")
    return "## Parity with the trained judge\n\n" + "\n".join(lines)


def _merges(merges: Sequence[MergeFigure]) -> str:
    if not merges:
        return ""
    ways = {"original": "into the 16-bit original", "dequantized": "into the dequantized 4-bit base"}
    rows = [
        (
            ways.get(each.onto, _text(each.onto)),
            f"{each.accuracy:.3f} ({each.low:.3f} to {each.high:.3f})",
            str(each.n),
            "yes" if each.kept else "",
        )
        for each in merges
    ]
    said = "Chosen on one half of the held-out pairs; the figures are of the other half."
    head = ("merged", "pair accuracy", "n", "kept")
    return f"## How the adapter was merged\n\n{said}\n\n{_table(head, rows)}"


def _licences(licence: str | None, base: str, sources: Sequence[str]) -> str:
    lines = ["## Licences", ""]
    if licence is not None:
        lines.append(f"This judge: {_text(licence)}.")
    else:
        lines.append("No licence has been chosen for this judge; choose one that its base and its data allow.")
    if base and base != "arena":
        lines.append(f"Base model {_code(base)}: {_base_licence(base) or UNKNOWN_LICENCE}.")
    if sources:
        rows = [(_code(source), *map(_text, _licence_of(source))) for source in sources]
        lines += ["", "Training data:", "", _table(("data", "licence", "recognised as", "note"), rows)]
    return "\n".join(lines)


def _licence_of(source: str) -> tuple[str, str, str]:
    """(licence, recognised as, note) of a pair set by its name.

    >>> _licence_of("pairs/gsm8k_pairs.jsonl.gz")[:2], _licence_of("mine.jsonl")[0]
    (('MIT', 'openai/grade-school-math'), 'licence not known: find out before you publish')
    """
    if source == "arena":
        return "none needed", "the arena of patarm-lite", "made by the program, no text of others"
    for pattern, origin, licence, note in KNOWN_DATA:
        if re.search(rf"(?<![a-z0-9])(?:{pattern})(?![a-z0-9])", source.lower()):
            return licence, origin, note
    return UNKNOWN_LICENCE, "", ""


def _limits(protocol: Protocol, trained: bool) -> str:
    lines = [
        "- Text can talk a judge into a better score. Tags and control tokens in it are broken; persuasion is not.",
        "- A score is comparable with scores of this judge only, on the same rubric.",
        "- A judgement that can't be read is no score: count it, never replace it by a number.",
        "- Constrained decoding hides unreadable judgements; figures say which decoding they are of.",
        "- Figures above hold for pairs like those they were measured on. Measure on yours: "
        "`patarm-lite calibrate FILE --pairs PAIRS`.",
    ]
    if not trained:
        lines.insert(0, "- A stock model: nothing was done to make its scores agree with anybody's preferences.")
    if protocol.thinking:
        lines.append("- It thinks before it judges; leave room for that in max_tokens.")
    return "## Limits\n\n" + "\n".join(lines)


def _origin(about: Mapping[str, Any], base: str, version: str) -> str:
    rows = [("patarm-lite", _code(version))]
    rows += [(label, _code(about[key])) for key, label in (("name", "run"), ("stage", "stage")) if about.get(key)]
    found = about.get("base")
    if base and isinstance(found, Mapping):
        labels = (("revision", "base revision"), ("commit", "base commit"), ("weights_sha256", "base weights SHA-256"))
        rows += [(label, _code(found[key])) for key, label in labels if found.get(key)]
    if about.get("recipe_sha256"):
        rows.append(("recipe SHA-256", _code(about["recipe_sha256"])))
    data = about.get("data")
    if isinstance(data, Mapping):
        rows += [(f"data: {key.replace('_', ' ')}", _code(value)) for key, value in data.items() if value is not None]
    versions = about.get("versions")
    if isinstance(versions, Mapping) and versions:
        rows.append(("trained with", _text(", ".join(f"{name} {number}" for name, number in versions.items()))))
    return "## Where it comes from\n\n" + _table(("", ""), rows)


# --- small things ---


def _base_of(about: Mapping[str, Any]) -> str:
    base = about.get("base")
    name = base.get("name") if isinstance(base, Mapping) else base
    return str(name) if name else ""


def _base_licence(base: str) -> str | None:
    return next((licence for beginning, licence in KNOWN_BASES if base.startswith(beginning)), None)


def _sources(about: Mapping[str, Any]) -> list[str]:
    return [str(source) for source in about.get("sources") or ()]


def _hash(text: str) -> str:
    return text if re.fullmatch(r"[0-9a-f]{64}", text) else "not computed"


def _size(count: int) -> str:
    """
    >>> _size(1_600_000), _size(4_700_000_000)
    ('1.6 MB', '4.7 GB')
    """
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
