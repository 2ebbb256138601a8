"""Figures with 95 % intervals from sums over pairs: shares, differences of shares, correlations. Numpy only.

A figure is a function of column totals; its interval draws prompts anew (the pairs of one prompt together, since they
are not independent) and takes the same function of each draw's totals. Ranks are those of the whole sample in every
draw: they are not taken anew, which moves an interval little and makes it cheap.

Where every prompt says the same, drawing them anew moves nothing, and twenty right ones of twenty would look like
certainty. The interval of a share then goes as far as the prompts that were not drawn may reach (`figure`, `bounds`).

Where several figures are looked at to see whether any of them is off (`together`), their intervals are wider, so that
all of them hold at once in 95 of 100 samples: of twenty ordinary intervals one excludes the truth by chance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from patarm_lite.metrics import CELLS, DRAWS, INTERVAL, Floats, average_ranks

Statistic = Callable[[Sequence[Floats]], Floats]
"""Column totals, [D] each, -> the figure of each draw, [D]; nan where it is not defined."""
Sample = tuple[Sequence[Hashable], Sequence[float]]
"""What is drawn together, and a value of each, [N] both."""
SHARE, CHANGE = (0.0, 1.0), (-1.0, 1.0)
"""Bounds of a share, and of a difference of two."""
SAME = 1e-12
ALARM = 0.05
"""How often one of several intervals of `together` excludes the truth, where nothing is to be found."""
LEAST_GROUPS = 10
"""Of fewer groups the signs come out all alike too often, in 2 of 2^n draws for each sample, to tell chance by."""


def figure(
    groups: Sequence[Hashable],
    columns: Sequence[Sequence[float] | Floats],
    statistic: Statistic,
    n: int,
    seed: int = 0,
    bounds: tuple[float, float] | None = None,
) -> dict[str, Any] | None:
    """`value` with `low`, `high` and `n` as plain JSON values; None where the value is not defined.

    Args:
        groups: [N] what is drawn together. columns: values, [N] each. n: what the figure counts, e.g. pairs.
        bounds: between which the statistic of any group lies (`SHARE`, `CHANGE`). Where all G groups that have
            something in the last column (what is divided by) say the same, up to 1 - 0.025^(1/G) of those not drawn may
            say otherwise (Clopper and Pearson's bound for none of G), and the interval reaches as far as they could
            move the value.

    >>> figure(["a", "b"], [[1, 1], [1, 1]], ratio, n=2)
    {'value': 1.0, 'low': 1.0, 'high': 1.0, 'n': 2}
    """
    names: dict[Hashable, int] = {}
    place = np.array([names.setdefault(group, len(names)) for group in groups], dtype=int)
    if not len(place):
        return None
    sums = np.stack([np.bincount(place, weights=np.asarray(column, dtype=float)) for column in columns], axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(statistic(list(sums.sum(axis=0)[:, None]))[0])
        if not np.isfinite(value):
            return None
        rng = np.random.default_rng(seed)
        block = max(1, CELLS // len(names))
        found = []
        for start in range(0, DRAWS, block):
            drawn = rng.multinomial(len(names), [1 / len(names)] * len(names), size=min(block, DRAWS - start))
            found.append(statistic(list((drawn @ sums).T)))
    draws = np.concatenate(found)
    draws = draws[np.isfinite(draws)]
    low, high = np.percentile(draws, INTERVAL)
    if bounds is not None and np.ptp(draws) < SAME:
        others = 1 - (INTERVAL[0] / 100) ** (1 / np.count_nonzero(sums[:, -1]))
        low, high = value - others * (value - bounds[0]), value + others * (bounds[1] - value)
    return {"value": value, "low": float(low), "high": float(high), "n": n}


def share_of(
    groups: Sequence[Hashable], part: Sequence[float] | Floats, whole: Sequence[float] | Floats, n: int, seed: int = 0
) -> dict[str, Any] | None:
    """The share that `part` has of `whole`, [N] both, as `figure` gives it; never certain, however alike all are.

    >>> found = share_of(range(20), [1] * 20, [1] * 20, n=20)
    >>> found["value"], round(found["low"], 3), found["high"]
    (1.0, 0.832, 1.0)
    """
    return figure(groups, [part, whole], ratio, n, seed, SHARE)


def together(
    samples: Sequence[tuple[Sequence[Hashable], Sequence[float]]], seed: int = 0
) -> list[dict[str, Any] | None]:
    """Means of several samples, with intervals that hold for all of them together; as `figure` gives them.

    The half width of each is its standard error times one factor for all: the 95th percentile of the largest |t| of the
    samples where the deviations from the means get random signs, one sign a group (a wild bootstrap of max-t). So
    groups that several samples share stay together, few groups make wide intervals, and what samples have in common is
    not paid for twice. Exact where deviations are as likely up as down, as where nothing is to be found.

    Args:
        samples: (groups, values) of each, [N] both. None comes back for one with fewer than LEAST_GROUPS groups.

    >>> one, other, few = together([(range(99), [1.0] * 99), (range(99), [0.0, 2.0, 1.0] * 33), ([1, 2], [3.0, 4.0])])
    >>> one, few
    ({'value': 1.0, 'low': 1.0, 'high': 1.0, 'n': 99}, None)
    >>> bool(other["low"] < other["value"] == 1.0 < other["high"])
    True
    """
    kept = [place for place, (groups, _) in enumerate(samples) if len(set(groups)) >= LEAST_GROUPS]
    found: list[dict[str, Any] | None] = [None] * len(samples)
    if not kept:
        return found
    names: dict[Hashable, int] = {}
    places = [np.array([names.setdefault(group, len(names)) for group in samples[one][0]]) for one in kept]
    counts = np.stack([np.bincount(place, minlength=len(names)) for place in places]).astype(float)
    sums = np.stack(
        [
            np.bincount(place, weights=np.asarray(samples[one][1], dtype=float), minlength=len(names))
            for one, place in zip(kept, places, strict=True)
        ]
    )
    n, groups_of = counts.sum(axis=1), (counts > 0).sum(axis=1)
    values = sums.sum(axis=1) / n
    rest = sums - values[:, None] * counts
    scale = np.sqrt(groups_of / (groups_of - 1)) / n
    errors = scale * np.sqrt((rest**2).sum(axis=1))
    signs = 2.0 * np.random.default_rng(seed).integers(0, 2, (DRAWS, len(names))) - 1
    moved = signs @ rest.T / n
    squares = (rest**2).sum(axis=1) - 2 * moved * (signs @ (rest * counts).T) + moved**2 * (counts**2).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.abs(moved) / (scale * np.sqrt(np.maximum(squares, 0)))
    largest = np.sort(np.where(moved == 0, 0.0, t).max(axis=1))
    factor = largest[math.ceil((1 - ALARM) * (DRAWS + 1)) - 1]
    for place, value, error, count in zip(kept, values, errors, n, strict=True):
        half = float(factor * error) if error else 0.0
        found[place] = {"value": float(value), "low": float(value) - half, "high": float(value) + half, "n": int(count)}
    return found


def ratio(totals: Sequence[Floats]) -> Floats:
    """First total over the second: a mean over some pairs, or a share."""
    return np.asarray(totals[0] / totals[1], dtype=float)


def ratio_difference(totals: Sequence[Floats]) -> Floats:
    """First over second total minus third over fourth."""
    return ratio(totals[:2]) - ratio(totals[2:])


def partial_products(x: Sequence[float], y: Sequence[float], z: Sequence[float]) -> list[float] | None:
    """Values whose mean is the partial rank correlation of x and y at equal z: products of what z leaves unexplained of
    the ranks, in units of their spread. None where nothing is left.

    >>> x, y, z = [1, 2, 3, 5, 4, 6], [2, 1, 3, 4, 6, 5], [1, 1, 2, 2, 3, 3]
    >>> bool(np.isclose(np.mean(partial_products(x, y, z)), rank_correlation(range(6), x, y, z)["value"]))
    True
    """
    if len(x) < 2:
        return None
    ranks = [average_ranks(values) for values in (x, y, z)]
    a, b, c = (values - values.mean() for values in ranks)
    if c @ c:
        a, b = (values - c * (values @ c) / (c @ c) for values in (a, b))
    spread = math.sqrt(float(a @ a) * float(b @ b)) / len(x)
    return None if spread < 1e-9 * len(x) else [float(value) for value in a * b / spread]


def rank_correlation(
    groups: Sequence[Hashable], x: Sequence[float], y: Sequence[float], z: Sequence[float] | None = None, seed: int = 0
) -> dict[str, Any] | None:
    """Spearman's correlation of x and y; with z their partial one, what z explains of both taken out.

    The partial correlation is (r_xy - r_xz r_yz) / sqrt((1 - r_xz^2) (1 - r_yz^2)) of the ranks. None where one of
    them is constant, or explained by z entirely.

    >>> round(rank_correlation("abcd", [1, 2, 3, 4], [10, 30, 20, 40])["value"], 12)     # 1 - 6 * 2 / (4 * 15)
    0.8
    """
    ranks = [average_ranks(values) for values in (x, y, *([] if z is None else [z]))] if len(x) > 1 else []
    ranks = [values - values.mean() for values in ranks]
    if not ranks or any(np.ptp(values) == 0 for values in ranks):
        return None
    pairs = [(i, j) for i in range(len(ranks)) for j in range(i + 1)]
    columns = [np.ones(len(x)), *ranks, *(ranks[i] * ranks[j] for i, j in pairs)]

    def statistic(totals: Sequence[Floats]) -> Floats:
        count, means = totals[0], [total / totals[0] for total in totals[1 : 1 + len(ranks)]]
        products = dict(zip(pairs, totals[1 + len(ranks) :], strict=True))
        shared = {(i, j): total / count - means[i] * means[j] for (i, j), total in products.items()}
        r = {(i, j): shared[i, j] / np.sqrt(shared[i, i] * shared[j, j]) for i, j in pairs if i != j}
        if z is None:
            return np.asarray(r[1, 0], dtype=float)
        left = (1 - r[2, 0] ** 2) * (1 - r[2, 1] ** 2)
        return np.where(left > 1e-12, (r[1, 0] - r[2, 0] * r[2, 1]) / np.sqrt(np.maximum(left, 1e-12)), np.nan)

    return figure(groups, columns, statistic, len(x), seed)
