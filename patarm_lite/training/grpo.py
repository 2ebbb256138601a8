"""GRPO with PAR through TRL's GRPOTrainer. Pairs stay together, prompts stay ours, sampling can be resumed.

Four things are ours and not TRL's: the order of rows (both groups of a pair must reach one reward call), the prompt
ids (contract 2: the `prompt` column holds ids, and one overridden method hands them through), how rollouts are drawn
(`rollouts.py`; by a seed of step and rank, so that a resumed run draws the same judgements), and two checks: that every
setting is on the built trainer as the recipe asks, and that rollouts come from the weights in training.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from patarm_lite.par import format_reward, preference_rewards
from patarm_lite.recipe import GrpoSection
from patarm_lite.records import Verdict
from patarm_lite.training.engine import settle
from patarm_lite.training.rollouts import aligned, check_gap, drawing, gap
from patarm_lite.training.trainer_settings import check_settings
from patarm_lite.verdicts import parse


def pair_order(pairs: int, seed: int, epoch: int) -> list[int]:
    """The order of the pairs in one epoch: a pure function of its arguments.

    >>> pair_order(4, seed=1, epoch=0) == pair_order(4, seed=1, epoch=0) != pair_order(4, seed=1, epoch=1)
    True
    """
    order = list(range(pairs))
    random.Random(f"pairs {seed} {epoch}").shuffle(order)
    return order


class PairSampler:
    """Row numbers for the trainer's loader: blocks of whole pairs, epoch after epoch without a gap.

    Row `2 i` of the data set is the chosen side of pair i, row `2 i + 1` the rejected side. A block is
    `pairs_per_step` pairs for each process: n times the chosen row, n times the rejected row of each. The loader's
    batch is what one process generates at once, so a block is repeated for the micro-batches that share it.
    The stream runs on over the end of an epoch, so no pair is ever dropped and resuming is skipping.
    """

    def __init__(self, pairs: int, n: int, block: int, repeats: int, blocks: int, seed: int) -> None:
        self.pairs, self.n, self.block, self.repeats, self.blocks, self.seed = pairs, n, block, repeats, blocks, seed

    def __len__(self) -> int:
        return self.blocks * self.block * self.repeats * 2 * self.n

    def stream(self) -> Iterator[int]:
        """Pair numbers without end."""
        epoch = 0
        while True:
            yield from pair_order(self.pairs, self.seed, epoch)
            epoch += 1

    def __iter__(self) -> Iterator[int]:
        stream = self.stream()
        for _ in range(self.blocks):
            rows: list[int] = []
            for pair in [next(stream) for _ in range(self.block)]:
                rows += [2 * pair] * self.n + [2 * pair + 1] * self.n
            for _ in range(self.repeats):
                yield from rows


Expected = Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]], Sequence[Verdict]], Sequence[float | None]]


class ParReward:
    """PAR as TRL reward functions, and the record of every rollout it judged.

    Call `preference` and `format` (or `total`, their sum) with TRL's keywords. Rewards are counted in the order of the
    batch: for each pair 2 n rollouts, chosen first.

    Args:
        decode: completion ids -> (text, ended).
        read: number of a pair, text, ended -> the verdict.
        expected: with `other_side` expected: prompts, completions (ids) and their verdicts -> expected scores, None
            where there is none.
    """

    def __init__(
        self,
        settings: GrpoSection,
        decode: Callable[[Sequence[int]], tuple[str, bool]],
        read: Callable[[int, str, bool], Verdict] = lambda pair, text, ended: parse(text, ended),
        expected: Expected | None = None,
    ) -> None:
        self.settings = settings
        self.decode = decode
        self.read = read
        self.expected = expected
        self.rows: list[dict[str, Any]] = []
        self.stats: dict[str, float] = {}
        self._judged: Any = None

    def functions(self) -> list[Callable[..., list[float]]]:
        """What to give the trainer: one summed function, or two that are normalised apart."""
        if self.settings.format_apart:
            return [_named("preference", self.preference), _named("format", self.format)]
        return [_named("par", self.total)]

    def total(self, **keywords: Any) -> list[float]:
        self._judge(**keywords)
        return [row["preference"] + row["format"] for row in self.rows]

    def preference(self, **keywords: Any) -> list[float]:
        self._judge(**keywords)
        return [row["preference"] for row in self.rows]

    def format(self, **keywords: Any) -> list[float]:
        self._judge(**keywords)
        return [row["format"] for row in self.rows]

    def _judge(
        self,
        *,
        completion_ids: list[list[int]],
        pair: list[int],
        side: list[int],
        prompts: Sequence[Sequence[int]] = (),
        **_: Any,
    ) -> None:
        if self._judged is completion_ids:
            return
        self._judged = completion_ids
        n = self.settings.n
        groups = whole_pairs(pair, side, n)
        texts = [self.decode(ids) for ids in completion_ids]
        verdicts = [self.read(number, text, ended) for number, (text, ended) in zip(pair, texts, strict=True)]
        against = self._compared_with(prompts, completion_ids, verdicts)
        self.rows = []
        wins, distances, dead = [], [], 0
        for start in groups:
            chosen, rejected = verdicts[start : start + n], verdicts[start + n : start + 2 * n]
            rewards = preference_rewards(
                chosen,
                rejected,
                self.settings.form,
                self.settings.findings,
                against[start : start + n],
                against[start + n : start + 2 * n],
            )
            for offset, group, preferences in ((0, chosen, rewards[0]), (n, rejected, rewards[1])):
                formats = [format_reward(verdict) for verdict in group]
                dead += len({a + b for a, b in zip(preferences, formats, strict=True)}) == 1
                for i, (verdict, preference, form) in enumerate(zip(group, preferences, formats, strict=True)):
                    at = start + offset + i
                    self.rows.append(
                        {
                            "pair": pair[at],
                            "side": "rejected" if side[at] else "chosen",
                            "text": texts[at][0],
                            "score": verdict.score,
                            "problem": verdict.problem,
                            "faults": list(verdict.faults),
                            "preference": preference,
                            "format": form,
                            "reward": preference + form,
                            "tokens": len(completion_ids[at]),
                        }
                    )
            means = _mean_score(chosen), _mean_score(rejected)
            if means[0] is not None and means[1] is not None:
                wins.append(1.0 if means[0] > means[1] else 0.5 if means[0] == means[1] else 0.0)
                distances.append(means[0] - means[1])
            else:
                wins.append(0.0)
        count = len(self.rows)
        self.stats = {
            "reward": sum(row["reward"] for row in self.rows) / count,
            "preference": sum(row["preference"] for row in self.rows) / count,
            "format": sum(row["format"] for row in self.rows) / count,
            "win_share": sum(wins) / len(wins),
            "distance": sum(distances) / len(distances) if distances else 0.0,
            "dead_groups": dead / (2 * len(groups)),
            "unreadable": sum(row["problem"] is not None for row in self.rows) / count,
            "faulty": sum(bool(row["faults"]) for row in self.rows) / count,
            "length": sum(row["tokens"] for row in self.rows) / count,
        }

    def _compared_with(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], verdicts: Sequence[Verdict]
    ) -> list[float | None]:
        """What each rollout counts with in the mean that the other side is compared with. A readable rollout without
        an expected score counts with the written one."""
        scores: list[float | None] = [verdict.score for verdict in verdicts]
        if self.settings.other_side == "sampled":
            return scores
        assert self.expected is not None
        expected = self.expected(prompts, completions, verdicts)
        return [e if s is not None and e is not None else s for s, e in zip(scores, expected, strict=True)]


def _named(name: str, function: Callable[..., list[float]]) -> Callable[..., list[float]]:
    def reward(**keywords: Any) -> list[float]:
        return function(**keywords)

    reward.__name__ = name
    return reward


def _mean_score(group: Sequence[Verdict]) -> float | None:
    scores = [verdict.score for verdict in group if verdict.score is not None]
    return sum(scores) / len(scores) if scores else None


def whole_pairs(pair: Sequence[int], side: Sequence[int], n: int) -> list[int]:
    """Where each pair's 2 n rollouts begin in a reward call.

    Raises:
        AssertionError: a pair is not there whole, chosen first. PAR of half a pair would be a silent lie.
    """
    if len(pair) % (2 * n):
        raise AssertionError(f"a reward call holds {len(pair)} rollouts, not a multiple of {2 * n}: a pair was split")
    starts = list(range(0, len(pair), 2 * n))
    for start in starts:
        end = start + 2 * n
        if len(set(pair[start:end])) != 1 or list(side[start:end]) != [0] * n + [1] * n:
            raise AssertionError(
                f"rollouts {start} to {end} of a reward call are pairs {sorted(set(pair[start:end]))}, "
                "not both groups of one pair"
            )
    return starts


def generation_seed(seed: int, step: int, rank: int, evaluated: int | None = None) -> int:
    """Seed of one generation: distinct over steps and ranks, below 2**63.

    `evaluated`: in evaluation, where many batches share a step, the first pair of the batch.
    """
    words = f"rollouts {seed} {step} {rank}" if evaluated is None else f"evaluation {seed} {step} {rank} {evaluated}"
    return random.Random(words).getrandbits(62)


def row_dataset(prompts: Sequence[tuple[list[int], list[int]]]) -> Any:
    """Rows 2 i and 2 i + 1: prompt ids of the chosen and of the rejected side of pair i."""
    from datasets import Dataset

    rows: dict[str, list[Any]] = {"prompt": [], "pair": [], "side": []}
    for number, sides in enumerate(prompts):
        for side, ids in enumerate(sides):
            rows["prompt"].append(ids)
            rows["pair"].append(number)
            rows["side"].append(side)
    return Dataset.from_dict(rows)


def trainer_class(base: type) -> type:
    """The GRPO trainer: `base` is TRL's class, or what an engine made of it (so this runs after its import)."""
    import torch

    class PairGrpoTrainer(base):  # type: ignore[misc, valid-type]
        par: ParReward
        on_rollouts: Callable[[int, list[dict[str, Any]]], None] | None = None

        def __init__(self, *, model: Any, args: Any, **keywords: Any) -> None:
            trained = [(weight, weight.data) for weight in model.parameters() if weight.requires_grad]
            asked = {name: getattr(args, name) for name in getattr(args, "wanted", {})}
            super().__init__(model=model, args=args, **keywords)
            own = {name: asked[name] for name in asked.keys() & vars(self).keys()}
            for built, wanted in ((self.args, asked), (self, own)):
                check_settings(built, wanted, "the constructed trainer")
            for weight, data in trained:
                if weight.dtype != data.dtype:  # TRL rounds a 4-bit judge's adapter to bfloat16: small steps vanish
                    weight.data = data.to(weight.device)
            settle(self.model)
            self._at_once = getattr(args, "decode_at_once", None)
            self._compared = False

        def _get_train_sampler(self, dataset: Any = None) -> Any:
            data = self.train_dataset if dataset is None else dataset
            args = self.args
            return _as_torch_sampler(
                PairSampler(
                    pairs=len(data) // 2,
                    n=args.num_generations,
                    block=args.generation_batch_size // (2 * args.num_generations),
                    repeats=args.steps_per_generation,
                    blocks=args.max_steps,
                    seed=args.seed,
                )
            )

        def _get_eval_sampler(self, eval_dataset: Any) -> Any:
            n = self.args.num_generations
            return _as_torch_sampler([row for row in range(len(eval_dataset)) for _ in range(n)])

        def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
            return [list(ids) for ids in prompts], None, {}

        def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
            step, rank = self.state.global_step, self.accelerator.process_index
            training = self.model.training
            seed = generation_seed(self.args.seed, step, rank, None if training else inputs[0]["pair"])
            torch.manual_seed(seed)
            judge = self.accelerator.unwrap_model(self.model)
            with drawing(judge, seed, self.args.temperature, self._at_once) as drawn:
                output = super()._generate_and_score_completions(inputs)
            _assert_ours([row["prompt"] for row in inputs], output["prompt_ids"], output["prompt_mask"])
            for row, advantage in zip(self.par.rows, output["advantages"].tolist(), strict=True):
                row["advantage"] = advantage
            if training and (not self._compared or step % self.args.save_steps == 0):
                returned = output.get("sampling_per_token_logps")  # by vLLM, of its own draws
                self._compare(output, drawn.log_probs if returned is None else returned, step + 1)
            if self.on_rollouts is not None and training:
                self.on_rollouts(step + 1, self.par.rows)
            return output

        def _compare(self, output: dict[str, Any], rollout: Any, step: int) -> None:
            """Stop unless rollouts and forward pass give the same tokens the same log-probabilities.

            Done at the first step of a process and every `save_steps`: a new adapter changes no answer at first, so
            weights that don't follow the training show later.
            """
            ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
            mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
            kept, rows = output["completion_ids"].shape[1], self.args.per_device_train_batch_size
            with torch.no_grad():
                forward = self._get_per_token_logps_and_entropies(self.model, ids, mask, kept, batch_size=rows)[0]
            forward = aligned(forward, output["prompt_mask"], kept)
            missing = torch.full_like(forward, torch.nan)
            mean, largest = gap(missing if rollout is None else rollout, forward, output["completion_mask"])
            self.par.stats |= {"log_prob_gap": mean, "log_prob_gap_max": largest}
            check_gap(mean, largest, _computed_in(self.args, self.model), step)
            self._compared = True

    return PairGrpoTrainer


def _computed_in(args: Any, model: Any) -> str:
    """The type that a trainer's forward pass multiplies matrices in."""
    if args.bf16 or args.fp16:
        return "bfloat16" if args.bf16 else "float16"
    return str(model.dtype).removeprefix("torch.")


def _assert_ours(prompts: Sequence[Sequence[int]], prompt_ids: Any, prompt_mask: Any) -> None:
    """The ids that the forward pass sees are the ids that our protocol made."""
    for ours, ids, mask in zip(prompts, prompt_ids.tolist(), prompt_mask.tolist(), strict=True):
        if [token for token, real in zip(ids, mask, strict=True) if real] != list(ours):
            raise AssertionError("the prompt ids of the forward pass are not those of the prompt protocol")


def _as_torch_sampler(rows: Any) -> Any:
    from torch.utils.data import Sampler

    class Rows(Sampler):  # type: ignore[misc]
        def __iter__(self) -> Iterator[int]:
            return iter(rows)

        def __len__(self) -> int:
            return len(rows)

    return Rows()


def epochs_of(steps: int, pairs_per_step: int, pairs: int) -> float:
    """How often each pair is seen in a run."""
    return math.floor(100 * steps * pairs_per_step / pairs) / 100
