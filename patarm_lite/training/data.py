"""The pairs of a run: the arena's or the user's, split, shuffled and counted; and judgements for the cold start."""

from __future__ import annotations

import itertools
import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from patarm_lite import arena
from patarm_lite.errors import UserError
from patarm_lite.metrics import longer_wins, pair_to_row
from patarm_lite.pairs import PairSource, balance, drop_long, load_pairs, shuffle_labels, split_by_prompt
from patarm_lite.prompts import Encoder
from patarm_lite.recipe import Recipe
from patarm_lite.records import TASKS, Pair, Rubric, Turn
from patarm_lite.training.run_folder import hash_rows
from patarm_lite.training.sft import Example
from patarm_lite.verdicts import NOTHING_WRITTEN, parse


@dataclass(frozen=True)
class RunPairs:
    """Pairs of a run before the token limit, and what was left out so far (kind of reason -> rows).

    Pairs of the user are all in `train`; `fit_pairs` holds some out once it is known which ones fit. `sets`: for each
    source what it was (`id`, `subset`, `split`, `revision`), its `commit` (None for a file), and `rows` and `pairs`.
    """

    train: list[Pair]
    heldout: list[Pair]
    dropped: dict[str, int]
    sets: list[dict[str, Any]] = field(default_factory=list)


def load_run_pairs(recipe: Recipe, offline: bool, known: Sequence[Mapping[str, Any]] = ()) -> RunPairs:
    """The arena's training and held-out pairs, or all pairs of the user.

    Args:
        known: `sets` of the run that goes on: its commits are taken, whatever the revisions stand for today.

    Raises:
        UserError: see `pairs.load_pairs` and `pairs.split_by_prompt`.
    """
    if not recipe.data.pairs:
        if recipe.model.base != "arena":
            raise UserError("a recipe without pairs trains on the arena alone; give pair files with --pairs FILE")
        return RunPairs(
            arena.training_pairs(recipe.arena.train_pairs, recipe.seed, recipe.arena.tampered),
            arena.heldout_pairs(recipe.data.heldout, recipe.seed),
            {},
        )
    sources = pair_sources(recipe)
    commits = {row["source"]: str(row["commit"]) for row in known if row.get("commit")}
    asked = [replace(source, revision=commits.get(source.name, source.revision)) for source in sources]
    loaded = load_pairs(asked, offline=offline, seed=recipe.seed)
    made = Counter(str(pair.meta["file"]) for pair in loaded.pairs)
    sets = []
    for source in sources:
        row = {
            "source": source.name,
            "revision": source.revision if source.name in loaded.commits else None,
            "commit": loaded.commits.get(source.name),
            "rows": loaded.rows[source.name],
            "pairs": made[source.name],
        }
        sets.append(row)
        if len(sources) > 1 or not source.layout_seen:
            layout = loaded.layouts[source.name]
            sys.stderr.write(f"{source.name}: {row['pairs']} pairs of {row['rows']} rows; {layout}\n")
    split_by_prompt(loaded.pairs, recipe.data.heldout, recipe.seed)  # too few: said before anything is written
    return RunPairs(loaded.pairs, [], _count(row.reason for row in loaded.dropped), sets)


def pair_sources(recipe: Recipe) -> list[PairSource]:
    """The sources of a recipe's pairs, each with what holds for it: what a set leaves out, the section says."""
    data = recipe.data
    found = []
    for one in data.pairs:
        if isinstance(one, str):
            found.append(PairSource(one, data.revision, data.map, data.task))
        else:
            mapping, revision, task = one.map or data.map, one.revision or data.revision, one.task or data.task
            found.append(PairSource(one.source, revision, mapping, task, one.count, one.layout_seen))
    return found


def _count(reasons: Iterator[str] | Sequence[str]) -> dict[str, int]:
    return dict(Counter(reason.partition(":")[0] for reason in reasons))


def fit_pairs(
    recipe: Recipe, pairs: RunPairs, encoder: Encoder, rubric: Callable[[str], Rubric]
) -> tuple[list[Pair], list[Pair], dict[str, Any]]:
    """(training pairs, held-out pairs, counts): token limit, split, balancing and label shuffling applied.

    Both sides of a pair must fit `data.max_prompt_tokens`; what doesn't is dropped and counted, never cut. Pairs of
    the user are then split by prompt.

    Raises:
        UserError: no pair fits, or too few to hold some out.
    """
    limit = recipe.data.max_prompt_tokens

    def length(pair: Pair) -> int:
        return max(map(len, encoder.pair_ids(pair, rubric(pair.task))))

    train, long_train = drop_long(pairs.train, length, limit)
    heldout, long_heldout = drop_long(pairs.heldout, length, limit)
    if train and not pairs.heldout:
        train, heldout = split_by_prompt(train, recipe.data.heldout, recipe.seed)
    if not train or not heldout:
        raise UserError(
            f"after the limit of data.max_prompt_tokens={limit} tokens {len(train)} training and {len(heldout)} "
            f"held-out pairs are left ({len(long_train) + len(long_heldout)} were longer); raise the limit"
        )
    if recipe.data.balance:
        train = balance(train, recipe.data.balance, recipe.seed)
    if recipe.data.shuffle_labels:
        train = shuffle_labels(train, recipe.data.shuffle_labels, recipe.seed)
    counts = {
        "train": len(train),
        "heldout": len(heldout),
        "train_by_task": {task: sum(pair.task == task for pair in train) for task in TASKS},
        "dropped": {**pairs.dropped, **_count([row.reason for row in (*long_train, *long_heldout)])},
        "labels_flipped": round(recipe.data.shuffle_labels * len(train)),
        "longer_wins_train": longer_wins(train),
        "longer_wins_heldout": longer_wins(heldout),
        "sha256_train": hash_rows([pair_to_row(pair) for pair in train]),
        "sha256_heldout": hash_rows([pair_to_row(pair) for pair in heldout]),
        "sets": pairs.sets,
    }
    return train, heldout, counts


def arena_examples(recipe: Recipe, encoder: Encoder) -> list[Example]:
    """Judgements of the arena's biased teacher, each seen once; a share of `sft.shared` of them in form `shared`, and
    of `sft.bare` as the score alone."""
    settings = recipe.sft
    drawn = itertools.islice(arena.sft_examples(recipe.arena, recipe.seed), settings.steps * settings.batch_size)
    chance = random.Random(f"shared {recipe.seed}")
    examples = []
    for pair, response, judgement in drawn:
        place = chance.random()
        make = own_example
        if place < settings.shared:
            make = shared_example
        elif place < settings.shared + settings.bare:
            make = bare_example
        examples.append(make(encoder, pair, response, judgement))
    return examples


def own_example(encoder: Encoder, pair: Pair, response: str, judgement: str) -> Example:
    """A judgement of an arena pair's side, in form `own`."""
    prompt = encoder.prompt_ids(pair.prompt, response, task=pair.task, rubric=arena.RUBRICS[pair.task])
    return Example.of(prompt, encoder.judgement_ids(judgement))


def bare_example(encoder: Encoder, pair: Pair, response: str, judgement: str) -> Example:
    """The score of that judgement alone, behind an empty rubric and an empty evaluation."""
    prompt = encoder.prompt_ids(pair.prompt, response, task=pair.task, rubric=arena.RUBRICS[pair.task])
    score = judgement.rpartition("<score>")[2]
    return Example.of([*prompt, *encoder.forced_ids(NOTHING_WRITTEN)], encoder.judgement_ids(score))


def shared_example(encoder: Encoder, pair: Pair, response: str, judgement: str) -> Example:
    """The same judgement in form `shared`: both answers are learned, what the judge reads between them is not."""
    rubric_text, evaluation = arena.in_two_parts(judgement)
    rubric = arena.RUBRICS[pair.task]
    first = encoder.rubric_prompt_ids(pair.prompt, task=pair.task, rubric=rubric)
    read = encoder.response_prompt_ids(pair.prompt, response, task=pair.task, rubric=rubric, rubric_text=rubric_text)
    written = len(first) + len(encoder.judgement_ids(rubric_text))
    return Example([*read, *encoder.judgement_ids(evaluation)], len(first), (written, len(read)))


def file_examples(
    path: Path, encoder: Encoder, rubric: Callable[[str], Rubric], limit: int
) -> tuple[list[Example], int]:
    """Judgements from a JSONL file with `prompt` (text or messages), `response`, `task` and `judgement`.

    Returns the examples and how many lines were left out because their judgement can't be read or is over the limit.

    Raises:
        UserError: no such file, a line that is not such an object (its number), nothing readable in it.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"sft.file {path} can't be read: {error}") from None
    examples, dropped = [], 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        prompt, response, task, judgement = _sft_row(line, f"sft.file {path} line {number}")
        ids = encoder.prompt_ids(prompt, response, task=task, rubric=rubric(task))
        if parse(judgement).score is None or len(ids) > limit:
            dropped += 1
        else:
            examples.append(Example.of(ids, encoder.judgement_ids(judgement)))
    if not examples:
        raise UserError(f"sft.file {path} holds no judgement that can be read ({dropped} lines left out)")
    return examples, dropped


def _sft_row(line: str, where: str) -> tuple[tuple[Turn, ...], str, str, str]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}") from None
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("response", "task", "judgement")):
        raise UserError(f"{where} needs the text fields response, task and judgement beside prompt")
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        return (Turn("user", prompt),), row["response"], row["task"], row["judgement"]
    if (
        isinstance(prompt, list)
        and prompt
        and all(isinstance(t, dict) and {"role", "content"} <= t.keys() for t in prompt)
    ):
        turns = tuple(Turn(str(t["role"]), str(t["content"])) for t in prompt)
        return turns, row["response"], row["task"], row["judgement"]
    raise UserError(f"{where}: prompt must be a text or a list of messages with role and content")
