"""A scalar reward model on the same base: the cold-started judge's transformer with one number at the prompt's end.

Trained with the Bradley-Terry loss -log sigmoid(s_chosen - s_rejected) on the training pairs. It reads the very
prompt ids that the judge would read, and its score is taken where the judge would begin to write. The scores are real
numbers without a scale: nothing that is said of judgements (votes, faults, expected scores) is said of them.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patarm_lite.metrics import summarise
from patarm_lite.prompts import Protocol
from patarm_lite.records import JudgedPair, Pair, Verdict, Vote
from patarm_lite.training.baselines import endless_order, train_stage
from patarm_lite.training.run import Context
from patarm_lite.training.run_folder import read_lines, write_lines

SCALAR_FILE = "scalar.json"
"""In a judge's folder: says that it is a scalar head."""
SCORES_FILE = "heldout_scores.jsonl"
"""In the run folder: one line for each held-out response, {"pair", "side", "score"}."""
LR = 1e-3
"""Learning rate of `method: scalar`."""


@dataclass(frozen=True, slots=True)
class PromptPair:
    """Prompt ids of the chosen and of the rejected side."""

    chosen: list[int]
    rejected: list[int]


def padded(rows: Sequence[Sequence[int]], pad: int) -> dict[str, Any]:
    """Right-padded `input_ids` and `attention_mask` [B, L]. The pad id occurs in no prompt (`prompts.Encoder`)."""
    import torch

    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def trainer_class() -> type:
    """transformers' Trainer with the Bradley-Terry loss. Rows 2 i and 2 i + 1 of a batch are one pair."""
    import torch
    from transformers import Trainer

    class ScalarTrainer(Trainer):  # type: ignore[misc]
        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            outputs = model(**inputs)
            scores = outputs.logits[:, 0].float()
            margins = scores[0::2] - scores[1::2]
            loss = -torch.nn.functional.logsigmoid(margins).mean()
            return (loss, outputs) if return_outputs else loss

    return ScalarTrainer


def scalar_head(folder: Path, seed: int, dtype: Any, pad: int) -> Any:
    """A sequence classifier of one number whose transformer is that of the judge in `folder`; the head is random."""
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, dtype=dtype, trust_remote_code=False
    )
    model.config.pad_token_id = pad
    return model


def scores_of(model: Any, prompts: Sequence[list[int]], pad: int, batch_size: int) -> list[float]:
    """The score of every prompt (token ids), in the order given."""
    import torch

    was_training = model.training
    model.eval()
    scores = [0.0] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        at = order[start : start + batch_size]
        batch = {key: rows.to(model.device) for key, rows in padded([prompts[i] for i in at], pad).items()}
        with torch.no_grad():
            found = model(**batch).logits[:, 0].float().tolist()
        for i, score in zip(at, found, strict=True):
            scores[i] = score
    model.train(was_training)
    return scores


def train_scalar(context: Context, stage: str) -> None:
    """Put a head on the cold-started judge and train both; the context's model becomes the scalar head."""
    began = time.monotonic()
    recipe = context.recipe
    encoder, pad = context.encoder, context.tokenizer.pad_token_id
    context.model = scalar_head(context.folder / "sft", recipe.seed, context.model.dtype, pad)
    pairs = [PromptPair(*encoder.pair_ids(pair, context.rubric(pair.task))) for pair in context.train]
    at = endless_order(len(pairs), f"scalar {recipe.seed}")
    train_stage(
        context,
        stage,
        context.model,
        trainer_class(),
        lambda batch: padded([ids for pair in batch for ids in (pair.chosen, pair.rejected)], pad),
        lambda index: pairs[at(index)],
        lr=LR,
        batch_size=max(1, recipe.sft.batch_size // 2),
        save_every=recipe.sft.save_every,
        began=began,
    )


def save_scalar(model: Any, tokenizer: Any, protocol: Protocol, rubric: str, folder: Path) -> None:
    """Write a scalar head's folder (safetensors, tokenizer, scalar.json) under a temporary name, then rename."""
    temporary = folder.with_name(folder.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary, safe_serialization=True)
    tokenizer.save_pretrained(temporary)
    described = {
        "kind": "scalar",
        "reads": {"protocol": protocol.name, "instructions": protocol.instructions, "thinking": protocol.thinking},
        "rubric": rubric,
        "pooling": "last token of the prompt",
    }
    (temporary / SCALAR_FILE).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def load_scalar(folder: Path) -> Any:
    """The scalar head that `save_scalar` wrote."""
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=False)


def scalar_summary(context: Context) -> dict[str, Any]:
    """Accuracy and correlations of the context's scalar head on the held-out pairs, as `summary.json` holds them.

    The scores themselves go to SCORES_FILE; a resumed run reads them there.
    """
    path = context.folder / SCORES_FILE
    if not path.is_file():
        with context.timed("evaluation"):
            encoder = context.encoder
            prompts = [ids for pair in context.heldout for ids in encoder.pair_ids(pair, context.rubric(pair.task))]
            pad = context.tokenizer.pad_token_id
            found = scores_of(context.model, prompts, pad, context.recipe.eval.batch_size)
            sides = [(pair.id, side) for pair in context.heldout for side in ("chosen", "rejected")]
            write_lines(
                path, [{"pair": i, "side": side, "score": s} for (i, side), s in zip(sides, found, strict=True)]
            )
    scores = [row["score"] for row in read_lines(path)]
    summary = summary_of_scores(context.heldout, scores[0::2], scores[1::2], context.recipe.eval.votes)
    sys.stderr.write(
        f"after: accuracy {summary['accuracy']:.3f} [{summary['low']:.3f}, {summary['high']:.3f}] on "
        f"{len(context.heldout)} held-out pairs, a scalar head\n"
    )
    return summary


def summary_of_scores(
    pairs: Sequence[Pair], chosen: Sequence[float], rejected: Sequence[float], votes: int, seed: int = 0
) -> dict[str, Any]:
    """What can be said of real-valued scores, in the words that `metrics.summarise` has for judgements.

    Accuracy, ties and rank correlations depend on the order of the scores alone, so their ranks stand in for them and
    the same code with the same bootstrap counts. There is nothing random in a score: the mean of `votes` votes is the
    score itself. What is said of texts only (faults, tokens, expected scores) is left out.

    >>> from patarm_lite.records import Turn
    >>> pairs = [Pair((Turn("user", str(i)),), "a b", "c", id=str(i)) for i in range(4)]
    >>> found = summary_of_scores(pairs, [0.5, -1.0, 3.5, 2.0], [0.25, -0.5, -9.0, 2.0], votes=4)
    >>> found["accuracy"], found["accuracy_mean4"], found["ties"], found["unreadable"]     # right, wrong, right, tie
    (0.625, 0.625, 0.25, 0.0)
    """
    rank = {score: place for place, score in enumerate(sorted({*chosen, *rejected}), 1)}

    def side(score: float) -> tuple[Vote, ...]:
        return (Vote(Verdict(rank[score]), ""),)

    judged = [JudgedPair(pair, side(c), side(r)) for pair, c, r in zip(pairs, chosen, rejected, strict=True)]
    found = _renamed(summarise(judged, seed), votes)
    kept = ("accuracy", "low", "high", "ties", "unreadable", "spearman_quality", "spearman_length")
    mean = [key for key in found if key.startswith("accuracy_mean")]
    rows = {name: _renamed(row, votes) for name, row in found["rows"].items()}
    return {"kind": "scalar", **{key: found[key] for key in (*kept, *mean)}, "rows": rows}


def _renamed(found: dict[str, Any], votes: int) -> dict[str, Any]:
    return {key.replace("accuracy_mean1", f"accuracy_mean{votes}", 1): value for key, value in found.items()}
