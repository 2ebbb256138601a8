"""Recipes: one YAML file describes one training run. Unknown keys are refused with the nearest known name."""

from __future__ import annotations

import copy
import importlib.resources
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from patarm_lite.errors import UserError, nearest

CARDS = {"8": 7.5, "12": 11.5, "t4": 14.5, "16": 15.0, "24": 21.9, "48": 44.0, "80": 78.0}
"""Class of card -> the least memory that counts as it, in units of 2**30 bytes: what torch reports of cards sold under
that size is less than the name says (A10G and L4 about 22, L40S about 44.4, T4 14.6)."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=False, allow_inf_nan=False)


class ModelSection(_Section):
    """The judge before training."""

    base: str = Field("arena", description="'arena' (a tiny judge from scratch), a hub id or a folder")
    revision: str = Field("main", description="hub revision: branch, tag or commit")
    tuning: Literal["full", "lora", "qlora"] = Field("full", description="which weights are trained")
    lora_r: int = Field(32, ge=1, description="LoRA rank")
    lora_alpha: int = Field(32, ge=1, description="LoRA alpha")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="compute type of the weights")
    checkpointing: Literal["auto", "off", "on"] = Field(
        "auto", description="recompute activations in the backward pass; auto: on a GPU (by Unsloth's way with Unsloth)"
    )
    hidden: int = Field(96, ge=16, description="arena judge: hidden size")
    layers: int = Field(2, ge=1, description="arena judge: layers")
    heads: int = Field(4, ge=1, description="arena judge: attention heads; half as many key-value heads")
    mlp: int = Field(288, ge=16, description="arena judge: feed-forward size")
    vocab: int = Field(800, ge=300, description="arena judge: tokens asked of the tokenizer")
    vocab_with_pairs: int = Field(4096, ge=300, description="arena judge: the same when it also learns from pair files")

    @field_validator("checkpointing", mode="before")
    @classmethod
    def _on_is_a_word(cls, value: Any) -> Any:
        """YAML reads `on` and `off` as true and false."""
        return ("on" if value else "off") if isinstance(value, bool) else value


class ProtocolSection(_Section):
    """What a judging prompt holds besides its contents."""

    instructions: bool = Field(True, description="begin the turn with the written protocol")
    thinking: bool = Field(False, description="let the judge think before it writes")
    rubric: Literal["arena", "standard"] = Field(
        "standard", description="primary rubrics: one short line, or the full ones"
    )


class PairSet(_Section):
    """One set of a mix of pairs, with what holds for it alone."""

    id: str = Field(description="a hub id OWNER/NAME, or a pair file")
    revision: str | None = Field(None, description="hub revision: branch, tag or commit; none: data.revision")
    subset: str | None = Field(None, description="hub subset (configuration); none: the set's only one")
    split: str | None = Field(None, description="hub split; none: train, or the only one")
    task: str | None = Field(None, description="task of every pair, or 'auto'; none: data.task")
    map: dict[str, str] = Field(default_factory=dict, description="column names, e.g. prompt: question; none: data.map")
    count: int | None = Field(None, ge=1, description="pairs drawn from it, by seed; none: all")
    layout_seen: bool = Field(True, description="false: nobody has read this set with this map yet")

    @model_validator(mode="after")
    def _one_place(self) -> PairSet:
        if (self.subset or self.split) and re.search(r"[@:]", self.id):
            raise ValueError(f"{self.id} names a subset or a split itself; leave out the keys subset and split")
        return self

    @model_serializer(mode="plain")
    def _given(self) -> dict[str, Any]:
        return {name: value for name in type(self).model_fields if (value := getattr(self, name)) not in (None, {})}

    @property
    def source(self) -> str:
        """The set as the pair readers name it: a file, or OWNER/NAME@SUBSET:SPLIT."""
        return self.id + (f"@{self.subset}" if self.subset else "") + (f":{self.split}" if self.split else "")


def _kind_of_source(value: Any) -> str:
    return "set" if isinstance(value, dict | PairSet) else "name"


class DataSection(_Section):
    """Preference pairs for GRPO and for evaluation."""

    pairs: list[
        Annotated[Annotated[str, Tag("name")] | Annotated[PairSet, Tag("set")], Discriminator(_kind_of_source)]
    ] = Field(
        default_factory=list,
        description="pair files, hub ids, or sets {id, revision, subset, split, task, map, count, layout_seen} to mix; "
        "none: the arena's own pairs",
    )
    revision: str = Field("main", description="hub revision of pair sets that name none")
    map: dict[str, str] = Field(default_factory=dict, description="column names, e.g. prompt: question")
    task: str = Field("auto", description="task of every pair, or 'auto': column, then heuristic")
    heldout: int = Field(400, ge=2, description="pairs kept for evaluation (at most a fifth of the data)")
    max_prompt_tokens: int = Field(1024, ge=32, description="longer judging prompts are dropped and counted")
    balance: list[Literal["task", "length"]] = Field(default_factory=list, description="even out tasks or length sign")
    filter_votes: int = Field(
        0, ge=0, description="votes per side to find and drop dead pairs before GRPO; 0: keep all"
    )
    shuffle_labels: float = Field(0.0, ge=0, le=1, description="share of training labels flipped (negative control)")

    def sources(self) -> list[str]:
        """The pairs' sources by name, as the pair readers take it."""
        return [one if isinstance(one, str) else one.source for one in self.pairs]


class ArenaSection(_Section):
    """The synthetic judging domain, where the truth of every pair is known."""

    train_pairs: int = Field(2000, ge=8, description="pairs for GRPO")
    bias: float = Field(
        0.75, ge=0, le=1, description="share of length in the SFT teacher's overall score: the planted flaw"
    )
    noise: float = Field(1.2, ge=0, description="standard deviation of the teacher's overall score")
    flip: float = Field(0.03, ge=0, le=0.5, description="share of the teacher's findings that are wrong")
    malformed: float = Field(0.03, ge=0, le=0.5, description="share of the teacher's judgements that are malformed")
    tampered: float = Field(
        0.0, ge=0, le=1, description="share of training responses that hold a forged verdict or the like, or more words"
    )


class SftSection(_Section):
    """Cold start."""

    source: Literal["arena", "file", "rejection", "none"] = Field(
        "arena", description="where judgements to learn from come from"
    )
    file: str | None = Field(None, description="source 'file': JSONL with prompt, response, task, judgement")
    init: str | None = Field(None, description="a run folder whose SFT judge is taken instead of training one")
    shared: float = Field(
        0.0, ge=0, lt=1, description="share of the arena's judgements in form shared: the rubric first, then a response"
    )
    bare: float = Field(0.0, ge=0, lt=1, description="share of the arena's judgements that are the score alone")
    steps: int = Field(900, ge=1, description="optimiser steps")
    batch_size: int = Field(64, ge=1, description="judgements a step")
    by_length: bool = Field(
        False, description="batches of judgements about equally long: faster where lengths differ much"
    )
    lr: float = Field(4e-3, gt=0, description="peak learning rate, cosine to 5 %")
    warmup: int = Field(50, ge=0, description="warm-up steps")
    votes: int = Field(4, ge=1, description="source 'rejection': judgements drawn per side")
    draw: Literal["free", "constrained"] = Field(
        "free", description="source 'rejection': how they are drawn; constrained: held to the protocol, always readable"
    )
    draw_pairs: int | None = Field(
        None, ge=2, description="source 'rejection': training pairs to draw for, evenly over tasks; none: all"
    )
    save_every: int = Field(300, ge=1, description="steps between checkpoints")


class GrpoSection(_Section):
    """GRPO with PAR."""

    steps: int = Field(120, ge=1, description="optimiser steps")
    pairs_per_step: int = Field(8, ge=1, description="pairs judged a step")
    n: int = Field(8, ge=2, description="rollouts of each side of a pair")
    per_device: int | None = Field(None, ge=1, description="rollouts in one forward and backward; none: all of a step")
    decode_at_once: int | None = Field(None, ge=1, description="rollouts decoded at once; none: all of a step")
    rollouts: Literal["generate", "vllm"] = Field(
        "generate", description="what draws rollouts: plain generate, or vLLM sharing Unsloth's weights (GPU)"
    )
    vllm_share: float = Field(0.4, gt=0, lt=1, description="share of the card's memory that vLLM may take")
    optimiser: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = Field(
        "adamw", description="optimiser of GRPO and SFT"
    )
    lr: float = Field(3e-4, gt=0, description="learning rate, constant after the warm-up")
    warmup: int = Field(5, ge=0, description="warm-up steps")
    temperature: float = Field(1.0, gt=0, description="sampling temperature of rollouts; top_p 1, top_k off")
    max_completion_tokens: int = Field(72, ge=8, description="a judgement longer than this is truncated")
    form: Literal["graded", "constant", "saturating", "auc", "bradley_terry"] = Field(
        "graded", description="form of PAR"
    )
    other_side: Literal["sampled", "expected"] = Field(
        "sampled", description="scores that a rollout is compared with; its own is always the sampled one"
    )
    writes: Literal["judgement", "evaluation", "score"] = Field(
        "judgement",
        description="what a rollout writes: all of it, the evaluation by a rubric written before (form shared), or the "
        "score alone (for --score only)",
    )
    findings: float = Field(0.5, ge=0, le=1, description="share of PAR paid for the score that the findings imply")
    format_apart: bool = Field(False, description="normalise preference and format reward apart, then add")
    loss: Literal["dapo", "grpo", "dr_grpo", "bnpo"] = Field("dapo", description="TRL's loss_type")
    scale_rewards: Literal["group", "batch", "none"] = Field("group", description="what rewards are divided by")
    beta: float = Field(0.0, ge=0, description="KL weight; must be 0 unless SFT was merged into the base")
    save_every: int = Field(20, ge=1, description="steps between checkpoints")
    stop_unreadable: float = Field(
        0.9, gt=0, le=1, description="a run above this share of unreadable judgements is stopped"
    )
    stop_dead_steps: int = Field(
        20, ge=1, description="a run with this many steps of dead groups, or above stop_unreadable, is stopped"
    )


class EvalSection(_Section):
    """Evaluation before and after."""

    votes: int = Field(4, ge=1, description="judgements per side; the mean of them is vote@k")
    batch_size: int = Field(256, ge=1, description="judgements generated together")


class Recipe(_Section):
    """One training run."""

    name: str = Field(description="what the run is called")
    method: Literal["par", "sft", "rejection", "scalar"] = Field("par", description="what follows the cold start")
    minutes: float | None = Field(
        None, gt=0, description="stop the method after this many minutes (for equal wall clock)"
    )
    engine: Literal["auto", "transformers", "unsloth"] = Field("auto", description="what runs the judge in training")
    needs_gpu: bool = Field(False, description="refuse to start without a GPU")
    cards: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="card (8, 12, 16, 24, 48, 80 in GB, or t4) -> dotted keys that differ on it"
    )
    card: str | None = Field(None, description="the entry of `cards` in force; set by `train`, `plan` and --card")
    seed: int = Field(1, ge=0, description="seed of everything drawn")
    threads: int | None = Field(None, ge=1, description="CPU threads; none: physical cores, at most 4")
    model: ModelSection = Field(default_factory=ModelSection)
    protocol: ProtocolSection = Field(default_factory=ProtocolSection)
    data: DataSection = Field(default_factory=DataSection)
    arena: ArenaSection = Field(default_factory=ArenaSection)
    sft: SftSection = Field(default_factory=SftSection)
    grpo: GrpoSection = Field(default_factory=GrpoSection)
    eval: EvalSection = Field(default_factory=EvalSection)
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        default_factory=list, description="trackers, as in TRL"
    )

    @field_validator("card", mode="before")
    @classmethod
    def _card_in_words(cls, value: Any) -> Any:
        return str(value) if type(value) is int else value

    @field_validator("cards", mode="before")
    @classmethod
    def _cards_in_words(cls, value: Any) -> Any:
        return {str(name): keys for name, keys in value.items()} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _agree(self) -> Recipe:
        rollouts = 2 * self.grpo.n * self.grpo.pairs_per_step
        if self.grpo.per_device is not None and rollouts % self.grpo.per_device:
            raise ValueError(
                f"grpo.per_device={self.grpo.per_device} does not divide the {rollouts} rollouts of a step "
                f"(2 sides x n={self.grpo.n} x pairs_per_step={self.grpo.pairs_per_step}); "
                f"choose a divisor of {rollouts}"
            )
        if self.grpo.beta > 0:
            raise ValueError(
                "grpo.beta must be 0: the reference would be the judge before SFT; merge SFT into the base first"
            )
        if self.data.filter_votes == 1:
            raise ValueError(
                "data.filter_votes=1 makes one comparison a pair, which is right or not, so every pair would be dead; "
                "give at least 2, better 4"
            )
        if self.method == "scalar" and self.model.tuning != "full":
            raise ValueError(
                f"method scalar trains every weight, but model.tuning is {self.model.tuning}; set model.tuning=full"
            )
        if self.method == "sft" and self.sft.source in ("rejection", "none"):
            raise ValueError(
                f"method sft goes on with the cold start's judgements, and sft.source={self.sft.source} has none to go "
                "on with; use method=rejection, or sft.source=file"
            )
        if self.sft.source == "file" and not self.sft.file:
            raise ValueError("sft.source is 'file' but sft.file names none")
        for name, share in (("shared", self.sft.shared), ("bare", self.sft.bare)):
            if share and self.sft.source != "arena":
                raise ValueError(
                    f"sft.{name}={share:g} is a share of the arena's judgements, but sft.source is "
                    f"{self.sft.source}; set sft.{name}=0"
                )
        if self.sft.shared + self.sft.bare >= 1:
            raise ValueError(
                f"sft.shared={self.sft.shared:g} and sft.bare={self.sft.bare:g} leave no whole judgements; their sum "
                "must be below 1"
            )
        missing = {"evaluation": "shared", "score": "bare"}.get(self.grpo.writes)
        if missing and not getattr(self.sft, missing):
            raise ValueError(
                f"grpo.writes={self.grpo.writes} needs a cold start that saw such answers; set sft.{missing}=0.3, say"
            )
        if self.grpo.writes == "score" and self.grpo.findings:
            raise ValueError(
                f"grpo.findings={self.grpo.findings:g} pays for findings, and with grpo.writes=score none are written; "
                "set grpo.findings=0"
            )
        if self.grpo.writes != "judgement" and self.method != "par":
            raise ValueError(
                f"grpo.writes={self.grpo.writes} is for method par, and method is {self.method}; leave it out"
            )
        return self


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, reading 1e-5 as a number and refusing a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise UserError(f"line {key_node.start_mark.line + 1}: key {key!r} is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def recipes_folder() -> Path:
    """The folder of the shipped recipes: inside the wheel, else beside the package in a checkout."""
    inside = Path(str(importlib.resources.files("patarm_lite"))) / "_recipes"
    return inside if inside.is_dir() else Path(__file__).resolve().parent.parent / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of every shipped recipe."""
    return {path.stem: path for path in sorted(recipes_folder().glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """A shipped recipe's name, or a path to a YAML file."""
    shipped = shipped_recipes()
    if name in shipped:
        return shipped[name]
    path = Path(name)
    if path.is_file():
        return path
    if path.exists():
        raise UserError(f"recipe {name} is a folder, not a YAML file")
    raise UserError(f"recipe {name!r} not found; shipped: {', '.join(shipped)}.{nearest(name, shipped)}")


def load_recipe(name: str, settings: Sequence[str] = (), card: str | None = None) -> Recipe:
    """Read a recipe, then what its `cards` say of a card, then `KEY=VALUE` settings (dotted keys, YAML values).

    Args:
        card: an entry of `cards`; none: what the file or the settings name as `card`, or no card at all. The recipe
            that comes out keeps the card it was made for, and no `cards` then.

    Raises:
        UserError: file not found or not UTF-8, broken YAML (line), unknown key (nearest name), wrong type or value; an
            unknown card, or cards that don't set the same keys.
    """
    path = find_recipe(name)
    data = _read(path)
    where = f"recipe {path}"
    given = [_setting(setting) for setting in settings]
    cards = _cards(data.get("cards"), where)
    for known in cards:
        check_recipe(_on_card(data, known, cards), f"{where}, card {known}")
    asked = card or next((value for key, value, _ in reversed(given) if key == "card"), None)
    named = asked or data.get("card")
    if named is not None and cards:
        data = _on_card(data, str(named), cards)
    elif asked is not None and str(asked) != str(data.get("card")):
        raise UserError(f"recipe {path} has no cards, so it is the same on all of them; leave out card {asked}")
    for key, value, setting in given:
        if key != "card":
            _put(data, key, value, f"--set {setting!r}")
    return check_recipe(data, where)


def _read(path: Path) -> dict[str, Any]:
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 (a safe loader)
    except UnicodeDecodeError as error:
        raise UserError(f"recipe {path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except yaml.YAMLError as error:
        raise UserError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from None
    except UserError as error:
        raise UserError(f"recipe {path} {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"recipe {path} holds no keys; see 'patarm-lite recipes show tiny' for one")
    return data


def _cards(found: Any, where: str) -> dict[str, dict[str, Any]]:
    """Card -> dotted keys, as checked as can be before they are applied."""
    if not found:
        return {}
    if not isinstance(found, dict) or not all(isinstance(keys, dict) for keys in found.values()):
        raise UserError(f"{where}: cards is no mapping of cards to dotted keys, e.g. 24: {{grpo.per_device: 2}}")
    cards = {str(name): {str(key): value for key, value in keys.items()} for name, keys in found.items()}
    for name in cards:
        if name not in CARDS:
            raise UserError(f"{where}: card {name!r} is not one of {', '.join(CARDS)}")
    first, *rest = cards
    for name in rest:
        odd = sorted(cards[first].keys() ^ cards[name].keys())
        if odd:
            lacks, has = (name, first) if odd[0] in cards[first] else (first, name)
            raise UserError(f"{where}: card {has} sets {odd[0]} and card {lacks} doesn't; all set the same keys")
    return cards


def _on_card(data: dict[str, Any], card: str, cards: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A recipe's keys as they are on a card; `card` stays and `cards` goes."""
    if card not in CARDS:
        raise UserError(f"card {card!r} is not one of {', '.join(CARDS)} (GB; t4: 16 GB without bfloat16)")
    if card not in cards:
        raise UserError(
            f"recipe {data.get('name')!r} has no card {card!r}, only {', '.join(cards)}: by calculation it fits on no "
            f"other; shipped recipes for {card}: {', '.join(recipes_for(card)) or 'none'}"
        )
    changed: dict[str, Any] = copy.deepcopy({key: value for key, value in data.items() if key != "cards"})
    for key, value in cards[card].items():
        _put(changed, key, copy.deepcopy(value), f"cards.{card}: {key}")
    return {**changed, "card": card}


def recipes_for(card: str) -> list[str]:
    """The shipped recipes that have a card, the smallest base first (by the size in their names)."""
    found = [name for name, path in shipped_recipes().items() if card in _cards(_read(path).get("cards"), name)]
    return sorted(found, key=lambda name: float((re.findall(r"(\d+(?:\.\d+)?)b$", name) or ["0"])[0]))


def card_for(vram_gb: float, fp16_only: bool) -> str:
    """The largest class of card that a machine's card belongs to.

    Args:
        vram_gb: its memory as torch reports it, in units of 2**30 bytes.
        fp16_only: it has no bfloat16 (T4, V100, RTX 20).

    Raises:
        UserError: it is smaller than every class.

    >>> card_for(23.6, False), card_for(14.6, True), card_for(7.8, False)
    ('24', 't4', '8')
    """
    fitting = [name for name, least in CARDS.items() if vram_gb >= least and (name != "t4" or fp16_only)]
    if fp16_only and "t4" in fitting:
        return "t4"
    if not fitting:
        raise UserError(
            f"the card has {vram_gb:.1f} GB and the smallest GPU recipe is made for 8; train a tiny judge with: "
            "patarm-lite train tiny, or see what would fit with: patarm-lite plan qwen3-0.6b --vram "
            f"{vram_gb:.0f}"
        )
    return max(fitting, key=CARDS.__getitem__)


def check_recipe(data: dict[str, Any], where: str) -> Recipe:
    """Validate a recipe's keys and values; one clear line for the first thing wrong."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{where}: {_first(error)}") from None


def _setting(setting: str) -> tuple[str, Any, str]:
    """(dotted key, value, the setting as it was typed)."""
    key, found, value = setting.partition("=")
    if not found or not key.strip():
        raise UserError(f"--set {setting!r} is not KEY=VALUE, e.g. --set grpo.lr=1e-4")
    try:
        return key.strip(), yaml.load(value, Loader=_Loader), setting  # noqa: S506 (a safe loader)
    except yaml.YAMLError:
        raise UserError(f"--set {setting!r}: the value is not YAML") from None


def _put(data: dict[str, Any], key: str, value: Any, where: str) -> None:
    *folders, leaf = key.split(".")
    for folder in folders:
        data = data.setdefault(folder, {})
        if not isinstance(data, dict):
            raise UserError(f"{where}: {folder} is a value, not a section")
    data[leaf] = value


def _first(error: ValidationError) -> str:
    problem = error.errors()[0]
    loc = [part for part in problem["loc"] if part not in ("set", "name") or part == problem["loc"][0]]
    place = ".".join(map(str, loc))
    if problem["type"] == "extra_forbidden":
        return f"unknown key {place!r}.{nearest(str(loc[-1]), _keys_at(problem['loc'][:-1]))}"
    if problem["type"] == "missing":
        return f"key {place!r} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    shown = "" if problem["type"] == "value_error" else f", found {problem['input']!r}"
    return f"{place}: {message}{shown}" if place else message


def _keys_at(loc: Sequence[int | str]) -> Iterable[str]:
    """The keys that a place in a recipe may have; a set of `data.pairs` is at ('data', 'pairs', number, 'set')."""
    section: Any = Recipe
    for part in loc:
        if part == "set":
            section = PairSet
        elif str(part) in _names(section):
            section = section.model_fields[str(part)].annotation
    return _names(section)


def _names(section: Any) -> Iterable[str]:
    fields: dict[str, Any] = getattr(section, "model_fields", {})
    return fields
