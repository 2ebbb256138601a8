"""Drawing from logits: exactly the inverse of the cumulated distribution, and llama.cpp's own distribution."""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from itertools import accumulate
from typing import Any

import numpy as np
import pytest

from patarm_lite.judge.sampling import draw, likeliest, probabilities, softmax

QWEN = 151_936


def rows(count: int, size: int, seed: int = 0, spread: float = 3.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, spread, (count, size)).astype(np.float32)


def drawn(logits: np.ndarray, chances: list[float], temperature: float = 1.0, top_k: int = 0) -> list[int]:
    many = np.repeat(logits, len(chances), axis=0) if len(logits) == 1 else logits
    return draw(many, many.max(axis=1), np.array(chances), temperature, top_k).tolist()


def plainly(row: np.ndarray, chances: list[float], temperature: float = 1.0) -> list[int]:
    """The first tokens whose running sum of probabilities exceeds the chance, added one by one in 64 bits."""
    sums = list(accumulate(np.exp((row - row.max()) / np.float32(temperature)).tolist()))
    return [bisect_right(sums, chance * sums[-1]) for chance in chances]


@pytest.mark.parametrize("size", [3, 512, 4096, 4097, 8192, QWEN])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_any_vocabulary_is_drawn_from_as_by_a_running_sum(size: int, temperature: float) -> None:
    chances = np.random.default_rng(1).random(12).tolist()
    for number, logits in enumerate(rows(3, size)):
        assert drawn(logits[None], chances, temperature) == plainly(logits, chances, temperature), number


@pytest.mark.parametrize("size", [100, 8193, QWEN])
def test_the_ends_of_the_distribution_are_its_first_and_last_possible_token(size: int) -> None:
    logits = np.full((1, size), -np.inf, np.float32)
    logits[0, [7, 60, size - 9]] = 0.0
    chances = [0.0, 1 / 3 - 1e-9, 1 / 3 + 1e-9, 2 / 3 + 1e-9, float(np.nextafter(1, 0))]
    assert drawn(logits, chances) == [7, 7, 60, size - 9, size - 9]
    logits[0, :] = -np.inf
    logits[0, size - 1] = 5.0
    assert drawn(logits, chances) == [size - 1] * 5


def test_boundaries_of_blocks_belong_to_the_next_token() -> None:
    """8192 equal weights: token t owns the chances from t / 8192 on."""
    logits = np.zeros((1, 8192), np.float32)
    tokens = [0, 1, 511, 512, 513, 1023, 1024, 8191]
    assert drawn(logits, [token / 8192 for token in tokens]) == tokens


def test_rows_are_drawn_from_each_by_its_own_chance() -> None:
    logits = rows(5, 9000, seed=3)
    chances = [0.1, 0.5, 0.9, 0.3, 0.0]
    assert drawn(logits, chances) == [plainly(row, [at])[0] for row, at in zip(logits, chances, strict=True)]


# top_k


@pytest.mark.parametrize(("size", "count"), [(50, 7), (5000, 40), (5000, 4999), (QWEN, 40), (QWEN, 1)])
def test_the_likeliest_tokens_are_those_of_a_sort(size: int, count: int) -> None:
    row = rows(1, size, seed=5)[0]
    assert likeliest(row, count).tolist() == sorted(np.argsort(-row, kind="stable")[:count].tolist())


def test_of_equal_logits_the_lowest_ids_are_the_likeliest() -> None:
    row = np.array([1, 5, 5, 0, 5, 5] * 2000, np.float32)
    assert likeliest(row, 3).tolist() == [1, 2, 4]


def test_top_k_draws_from_the_k_likeliest_alone() -> None:
    row = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))[None]
    chances = [0.0, 0.57, 0.58, 0.99]  # of 0.4 and 0.3: 0.4 / 0.7 = 0.571
    assert drawn(row, chances, top_k=2) == [1, 1, 3, 3]
    assert drawn(row, chances, top_k=4) == drawn(row, chances)
    wide = rows(4, QWEN, seed=6)
    assert drawn(wide, [0.5] * 4, top_k=1) == wide.argmax(axis=1).tolist()


# against llama.cpp


class Chain:
    """llama.cpp's own samplers on a row of logits."""

    def __init__(self, *parts: Any) -> None:
        import llama_cpp

        self.llama = llama_cpp
        self.chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        for part in parts:
            llama_cpp.llama_sampler_chain_add(self.chain, part)

    def draw(self, row: np.ndarray, count: int) -> np.ndarray:
        kind = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
        fresh = np.zeros(len(row), kind)
        fresh["id"], fresh["logit"] = np.arange(len(row)), row
        found = np.empty(count, np.int64)
        for number in range(count):
            data = fresh.copy()
            pointer = ctypes.cast(data.ctypes.data, ctypes.POINTER(self.llama.llama_token_data))
            array = self.llama.llama_token_data_array(pointer, len(row), -1, False)
            self.llama.llama_sampler_apply(self.chain, ctypes.byref(array))
            found[number] = array.data[array.selected].id
        self.llama.llama_sampler_free(self.chain)
        return found


def chi_square(counts: np.ndarray, shares: np.ndarray) -> float:
    """In standard deviations: about normal for many classes, so beyond 4 is no accident."""
    expected = shares * counts.sum()
    classes = expected >= 20
    merged = np.append(expected[classes], expected[~classes].sum()), np.append(counts[classes], counts[~classes].sum())
    kept = merged[0] > 0
    statistic = ((merged[1][kept] - merged[0][kept]) ** 2 / merged[0][kept]).sum()
    freedom = kept.sum() - 1
    return float((statistic - freedom) / np.sqrt(2 * freedom))


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.7, 0), (1.5, 0), (1.0, 40)])
def test_both_samplers_draw_from_the_same_distribution(temperature: float, top_k: int) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    size, count = 6000, 20_000
    row = rows(1, size, seed=9, spread=2.5)[0]
    weights = np.exp((row.astype(np.float64) - row.max()) / temperature)
    if top_k:
        weights[np.argsort(-row, kind="stable")[top_k:]] = 0
    shares = weights / weights.sum()
    parts = [llama_cpp.llama_sampler_init_top_k(top_k)] if top_k else []
    parts += [llama_cpp.llama_sampler_init_temp(temperature), llama_cpp.llama_sampler_init_dist(1234)]
    theirs = np.bincount(Chain(*parts).draw(row, count), minlength=size)
    chances = np.random.default_rng(11).random(count)
    ours = np.concatenate(
        [
            draw(np.broadcast_to(row, (len(part), size)), np.full(len(part), row.max()), part, temperature, top_k)
            for part in np.split(chances, 100)
        ]
    )
    for counts in (theirs, np.bincount(ours, minlength=size)):
        assert counts[shares == 0].sum() == 0
        assert abs(chi_square(counts, shares)) < 4
    warmer = weights ** (1 / 1.1)  # the measure sees a temperature that is wrong by a tenth
    assert chi_square(np.bincount(ours, minlength=size), warmer / warmer.sum()) > 10


# probabilities of few tokens


@pytest.mark.parametrize("size", [10, 8192, QWEN])
def test_probabilities_of_few_tokens_are_those_of_the_whole_row(size: int) -> None:
    row = rows(1, size, seed=13)[0]
    ids = [0, 3, 9, int(row.argmax()) % size]
    assert probabilities(row, ids) == pytest.approx(softmax(row)[ids].tolist(), rel=1e-6)
    assert sum(probabilities(row, range(size))) == pytest.approx(1, abs=1e-6)
