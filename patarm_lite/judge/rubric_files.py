"""Rubrics in files: YAML with criteria, weights and anchors of the scale, or the protocol's own lines.

    task: chat                          # optional; what the rubric is for
    criteria:
      - name: Tone                      # 1 to 60 characters, without ( ) : < >
        weight: 3                       # 1 to 5; 1 where it is left out
        description: speaks to the reader as an equal
        scale:                          # optional: what scores mean
          1: insults
          10: warm and exact

A judge reads `Tone (3): speaks to the reader as an equal; 1 = insults; 10 = warm and exact`. A file that doesn't end
in .yaml or .yml holds such lines, one a criterion.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from patarm_lite.errors import UserError, nearest
from patarm_lite.recipe import _Loader
from patarm_lite.records import TASKS, Criterion, Rubric
from patarm_lite.rubrics import WEIGHTS, parse_rubric, primary_rubric, read_line, rubric_text
from patarm_lite.verdicts import SCORES

LARGEST = 100_000
"""Bytes of a rubric file at most: a larger one was not meant to be read with every response."""
_ANCHOR = re.compile(r"; (?:10|[1-9]) = ")


def _one_line(value: Any) -> Any:
    return unicodedata.normalize("NFC", " ".join(value.split())) if isinstance(value, str) else value


Line = Annotated[str, BeforeValidator(_one_line), Field(min_length=1, strict=True)]


class _CriterionInFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: Line
    weight: int = Field(1, ge=WEIGHTS[0], le=WEIGHTS[-1], strict=True)
    description: Line
    scale: dict[int, Line] = Field(default_factory=dict)


class _RubricInFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    task: Literal["chat", "math", "code", "safety"] | None = None
    criteria: list[_CriterionInFile] = Field(min_length=1)


@dataclass(frozen=True, slots=True)
class RubricFile:
    """A rubric from a file and the task it is for (None: any)."""

    rubric: Rubric
    task: str | None = None


def load_rubric(path: str | Path) -> RubricFile:
    """Read a rubric file.

    Raises:
        UserError: no such file, too large, not UTF-8, not YAML, an unknown key (with the nearest name), a value of the
            wrong kind, a criterion that the protocol's line form can't hold, or two of one name.
    """
    path = Path(path)
    where = f"rubric {path}"
    if not path.is_file():
        raise UserError(f"{where} not found or no file; 'patarm-lite rubrics show chat > mine.yaml' makes one to edit")
    if path.stat().st_size > LARGEST:
        raise UserError(f"{where} has {path.stat().st_size} bytes; a rubric file holds at most {LARGEST}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    return read_rubric(text, where) if path.suffix in (".yaml", ".yml") else RubricFile(parse_rubric(text, where))


def read_rubric(text: str, where: str = "rubric") -> RubricFile:
    """A rubric from YAML.

    >>> read_rubric("criteria: [{name: Tone, description: is friendly, scale: {1: rude, 10: warm}}]").rubric
    (Criterion(name='Tone', description='is friendly; 1 = rude; 10 = warm', weight=1),)
    """
    try:
        data = yaml.load(text.removeprefix("\ufeff"), Loader=_Loader)  # noqa: S506 (a safe loader)
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not YAML: {' '.join(str(error).split())}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} can't be read: {str(error)[:80]}") from None
    except UserError as error:
        raise UserError(f"{where} {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{where} holds no keys; it needs 'criteria:' with a list, see: patarm-lite rubrics show chat")
    try:
        found = _RubricInFile.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{where}: {_first(error)}") from None
    criteria: dict[str, Criterion] = {}
    for read in found.criteria:
        wrong = sorted(set(read.scale) - set(SCORES))
        if wrong:
            raise UserError(f"{where}: {read.name!r} has an anchor for {wrong[0]}; scores go from 1 to 10")
        anchors = [f"{score} = {meaning}" for score, meaning in sorted(read.scale.items())]
        criterion = Criterion(read.name, "; ".join([read.description, *anchors]), read.weight)
        if read_line(rubric_text((criterion,))) != criterion:
            raise UserError(
                f"{where}: {read.name[:60]!r} can't be a criterion's name: 1 to 60 characters without ( ) : < > ‹"
            )
        if read.name in criteria:
            raise UserError(f"{where} names {read.name!r} twice; give each criterion its own name")
        criteria[read.name] = criterion
    return RubricFile(tuple(criteria.values()), found.task)


def rubric_yaml(rubric: Rubric, task: str | None = None) -> str:
    """A rubric as YAML that `read_rubric` reads back, anchors of the scale on lines of their own.

    >>> print(rubric_yaml((Criterion("Tone", "is friendly; 10 = warm", 2),)), end="")
    criteria:
    - name: Tone
      weight: 2
      description: is friendly
      scale:
        10: warm
    """
    criteria = []
    for criterion in rubric:
        description, *meanings = _ANCHOR.split(criterion.description)
        scores = [int(found[0].split()[1]) for found in _ANCHOR.finditer(criterion.description)]
        row: dict[str, Any] = {"name": criterion.name, "weight": criterion.weight, "description": description}
        scale = dict(zip(scores, meanings, strict=True))
        if scores and list(scale) == sorted(scores) and all([description.strip(), *map(str.strip, meanings)]):
            row["scale"] = scale
        else:
            row["description"] = criterion.description
        criteria.append(row)
    data = {**({"task": task} if task else {}), "criteria": criteria}
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1_000_000)


def find_rubric(name: str) -> RubricFile:
    """A task's primary rubric, or a rubric file."""
    return RubricFile(primary_rubric(name), name) if name in TASKS else load_rubric(name)


class _Dumper(yaml.SafeDumper):
    """Quotes what our loader would not read as text, such as '1e-5'."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def _first(error: ValidationError) -> str:
    """The first thing wrong; a mistyped key before the key that is missing because of it."""
    problem = min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    *above, last = problem["loc"] or ("",)
    place = ".".join(str(part + 1 if isinstance(part, int) else part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = _CriterionInFile.model_fields if above else _RubricInFile.model_fields
        return f"unknown key {place!r}.{nearest(str(last), known)}"
    if problem["type"] == "missing":
        return f"key {place!r} is missing"
    return f"{place}: {problem['msg']}, found {str(problem['input'])[:40]!r}"
