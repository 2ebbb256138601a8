"""Finding training pairs that the start judge already decides, always or never, and leaving them out of GRPO.

Each pair gets k judgements a side, and every judgement of one side is compared with every one of the other: k x k
comparisons. A comparison is right when both judgements are readable and the chosen response's score is higher; a tie
or an unreadable judgement is not right. A pair is dead when
- `unreadable`: no comparison could be made, since one side has no readable judgement;
- `wrong`: comparisons could be made and none is right;
- `right`: all k x k are right.
Groups of rollouts of such a pair would mostly earn one and the same reward, and so teach nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from patarm_lite.errors import UserError
from patarm_lite.training.evaluation import judge_pairs
from patarm_lite.training.run import Context
from patarm_lite.training.run_folder import read_lines, write_lines

FILE = "dead_pairs.jsonl"
"""One line for every training pair: its scores and why it is dead, or null."""
CAUSES = ("right", "wrong", "unreadable")


def dead(chosen: Sequence[int | None], rejected: Sequence[int | None]) -> str | None:
    """Why a pair with these scores is dead, or None. A score is None where the judgement can't be read.

    >>> dead([7, 8], [6, 5]), dead([7, 8], [7, 5]), dead([5, 6], [6, 6]), dead([None, None], [3, 4])
    ('right', None, 'wrong', 'unreadable')
    """
    readable = [(c, r) for c in chosen for r in rejected if c is not None and r is not None]
    right = sum(c > r for c, r in readable)
    if not readable:
        return "unreadable"
    if right == 0:
        return "wrong"
    return "right" if right == len(chosen) * len(rejected) else None


def filter_dead_pairs(context: Context) -> None:
    """Take the dead pairs out of the context's training pairs. They are found once: a resumed run reads the file.

    Raises:
        UserError: every pair is dead, or the file is of other pairs.
    """
    path, votes = context.folder / FILE, context.recipe.data.filter_votes
    if not path.is_file():
        with context.timed("filter"):
            write_lines(path, _judge(context))
    rows = list(read_lines(path))
    if len(rows) != len(context.train):
        raise UserError(f"{path} holds {len(rows)} pairs, the run {len(context.train)}; start a new run")
    counts = {cause: sum(row["dead"] == cause for row in rows) for cause in CAUSES}
    kept = [pair for pair, row in zip(context.train, rows, strict=True) if row["dead"] is None]
    context.folder.note(filter={"votes": votes, "pairs": len(rows), "kept": len(kept), "dead": counts})
    words = ", ".join(f"{number} {cause}" for cause, number in counts.items())
    sys.stderr.write(f"dead pairs: {len(rows) - len(kept)} of {len(rows)} left out ({words})\n")
    if not kept:
        raise UserError(
            f"all {len(rows)} training pairs are dead for the start judge at data.filter_votes={votes} ({words}): "
            "give other pairs, more votes, or data.filter_votes=0"
        )
    context.train = kept


def _judge(context: Context) -> list[dict[str, object]]:
    votes, seed = context.recipe.data.filter_votes, context.recipe.seed
    judged = judge_pairs(context.sampler(), context.train, context.rubric, votes, seed, "finding dead pairs")
    rows: list[dict[str, object]] = []
    for item in judged:
        chosen, rejected = ([vote.verdict.score for vote in side] for side in (item.chosen, item.rejected))
        rows.append({"pair": item.pair.id, "chosen": chosen, "rejected": rejected, "dead": dead(chosen, rejected)})
    return rows
