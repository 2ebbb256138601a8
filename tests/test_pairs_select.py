"""Splits, balancing, flipped labels and the length filter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from patarm_lite.errors import UserError
from patarm_lite.pairs import balance, drop_long, shuffle_labels, split_by_prompt
from patarm_lite.pairs.checks import length_sign
from patarm_lite.records import Pair, Turn


def made(prompt: str, chosen: str = "good", rejected: str = "bad", task: str = "chat", **meta: Any) -> Pair:
    """A pair of one user turn."""
    return Pair((Turn("user", prompt),), chosen, rejected, task, id=f"{prompt}/{chosen}/{rejected}", meta=meta)


def test_all_pairs_of_a_prompt_are_on_one_side() -> None:
    pairs = [made(f"Prompt {n // 3}", f"good {n}") for n in range(60)]
    pairs += [made(f"  prompt\n{n}", "case and white space do not count") for n in range(20)]
    train, held = split_by_prompt(pairs, 16, seed=1)
    assert len(train) + len(held) == 80 and len(held) == 16
    assert not {" ".join(p.prompt[0].content.lower().split()) for p in train} & {
        " ".join(p.prompt[0].content.lower().split()) for p in held
    }


def test_all_pairs_of_a_slug_are_on_one_side_even_through_a_shared_prompt() -> None:
    # prompts 0 and 1 share slug a, prompts 1 and 2 share slug b: one group of 3; and so on
    pairs = [made(f"p{g}{n}", slug=f"s{g}{max(n, 1)}") for g in range(20) for n in range(3)]
    pairs += [made(f"p{g}1", "again", slug=f"s{g}2") for g in range(20)]
    train, held = split_by_prompt(pairs, 16, seed=3)
    assert len(held) == 16
    assert not {p.prompt[0].content[:-1] for p in train} & {p.prompt[0].content[:-1] for p in held}


def test_a_split_depends_on_the_seed_and_not_on_the_order() -> None:
    pairs = [made(f"p{n}") for n in range(50)]
    ids = [
        {pair.id for pair in split_by_prompt(some, 10, seed)[1]}
        for some, seed in ((pairs, 1), (pairs[::-1], 1), (pairs, 2))
    ]
    assert ids[0] == ids[1] != ids[2]
    train, held = split_by_prompt(pairs, 10, 1)
    assert [p.id for p in train] == [p.id for p in pairs if p.id not in ids[0]] and len(held) == 10


def test_at_most_a_fifth_is_held_out_and_too_few_pairs_are_refused() -> None:
    assert len(split_by_prompt([made(f"p{n}") for n in range(24)], 400, seed=1)[1]) == 4
    with pytest.raises(UserError, match="9 pairs are too few to hold out 400"):
        split_by_prompt([made(f"p{n}") for n in range(9)], 400, seed=1)
    with pytest.raises(UserError, match="ask for 2 or more"):
        split_by_prompt([made(f"p{n}") for n in range(100)], 1, seed=1)
    with pytest.raises(UserError, match="the smallest such group has 10 of 20 pairs and at most 4 may be held out"):
        split_by_prompt([made(f"p{n % 2}", f"good {n}") for n in range(20)], 5, seed=1)


LONGER, SHORTER, EQUAL = ("long", "s"), ("s", "long"), ("x", "y")


def _cells(pairs: Sequence[Pair]) -> Counter[tuple[str, int]]:
    return Counter((pair.task, length_sign(pair)) for pair in pairs)


def _set() -> list[Pair]:
    """chat: 5 longer, 3 shorter, 2 equal; code: 2 longer, 4 shorter, 1 equal."""
    plan = [
        ("chat", LONGER, 5),
        ("chat", SHORTER, 3),
        ("chat", EQUAL, 2),
        ("code", LONGER, 2),
        ("code", SHORTER, 4),
        ("code", EQUAL, 1),
    ]
    return [made(f"{task}{sides}{n}", *sides, task=task) for task, sides, count in plan for n in range(count)]


def test_balancing_by_task_keeps_as_many_as_the_smallest_has() -> None:
    kept = balance(_set(), ["task"], seed=1)
    assert Counter(pair.task for pair in kept) == {"chat": 7, "code": 7}


def test_balancing_by_length_evens_the_signs_in_every_task_and_keeps_equal_lengths() -> None:
    kept = balance(_set(), ["length"], seed=1)
    assert _cells(kept) == {
        ("chat", 1): 3,
        ("chat", -1): 3,
        ("chat", 0): 2,
        ("code", 1): 2,
        ("code", -1): 2,
        ("code", 0): 1,
    }


def test_balancing_by_both_evens_all_cells() -> None:
    kept = balance(_set(), ["task", "length"], seed=1)
    assert _cells(kept) == {(task, sign): 2 for task in ("chat", "code") for sign in (1, -1)}


def test_balancing_keeps_the_order_repeats_with_the_seed_and_can_do_nothing() -> None:
    pairs = _set()
    kept = balance(pairs, ["task"], seed=1)
    assert kept == balance(pairs, ["task"], seed=1) == [pair for pair in pairs if pair in kept]
    assert balance(pairs, [], seed=1) == pairs
    assert balance([], ["task", "length"], seed=1) == []


def test_balancing_refuses_what_cannot_be_evened() -> None:
    with pytest.raises(
        UserError, match="task chat can't be balanced by length: the rejected reply is the longer one in none"
    ):
        balance([made("p", *LONGER)], ["length"], seed=1)
    with pytest.raises(UserError, match="'colour'"):
        balance(_set(), ["colour"], seed=1)  # type: ignore[list-item]


@given(st.integers(0, 40), st.floats(0, 1), st.integers(0, 5))
def test_exactly_the_stated_share_of_labels_is_flipped(n: int, share: float, seed: int) -> None:
    pairs = [made(f"p{k}") for k in range(n)]
    flipped = shuffle_labels(pairs, share, seed)
    assert sum(pair.chosen == "bad" for pair in flipped) == round(share * n)
    assert all((pair.chosen == "bad") == bool(pair.meta.get("flipped")) for pair in flipped)
    assert [pair.id for pair in flipped] == [pair.id for pair in pairs]
    assert flipped == shuffle_labels(pairs, share, seed)


def test_what_describes_a_side_is_flipped_with_it() -> None:
    (pair,) = shuffle_labels([made("p", chosen_quality=9, rejected_quality=2, chosen_only="x", gap=7)], 1.0, seed=0)
    assert (pair.chosen, pair.rejected) == ("bad", "good")
    assert pair.meta == {"chosen_quality": 2, "rejected_quality": 9, "rejected_only": "x", "gap": 7, "flipped": True}


def test_a_share_outside_0_to_1_is_refused() -> None:
    with pytest.raises(UserError, match="from 0 to 1"):
        shuffle_labels([], 1.5, seed=1)


def test_long_pairs_are_dropped_with_their_row_and_their_length() -> None:
    pairs = [made("four", file="f.jsonl", row=7), made("seven77", file="f.jsonl", row=9)]
    kept, dropped = drop_long(pairs, lambda pair: len(pair.prompt[0].content), 4)
    assert kept == pairs[:1]
    assert [(one.source, one.row, one.reason) for one in dropped] == [("f.jsonl", 9, "longer than 4 tokens: 7")]
