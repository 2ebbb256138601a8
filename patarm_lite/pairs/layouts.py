"""Which layout a source has, found from its columns.

A layout's `read` is a pure function row -> drafts. It gives a list of drafts, where a string stands for a pair that
can't be made and says why, or one string for the whole row. It checks shapes only; empty, identical and non-text
replies are for `checks`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from patarm_lite.errors import UserError
from patarm_lite.pairs.fields import Fields, Layout, find_fields
from patarm_lite.pairs.files import Row
from patarm_lite.pairs.ratings import ONE_A_ROW, grouped_by_prompt, rated_layout
from patarm_lite.pairs.sides import sides_layout
from patarm_lite.pairs.winners import winner_layout


def find_layout(
    rows: Sequence[Row], mapping: Mapping[str, str], where: str, min_gap: float
) -> tuple[Layout, list[Row]]:
    """The layout of a source, and its rows (regrouped where each row holds one rated response).

    Args:
        rows: all rows. mapping: field -> column, and `first`/`second`/`tie` -> value of the winner column.
        where: the source's name, for errors. min_gap: smallest difference of two ratings that makes a pair.

    Raises:
        UserError: no record among the rows; columns that fit no layout; a winner column whose numbers are ambiguous.
    """
    records = [row.value for row in rows if isinstance(row.value, dict)]
    columns = list(dict.fromkeys(column for record in records for column in record))
    if not columns:
        raise UserError(f"{where}: no row is a record with named columns; see the layouts in the documentation")
    fields = find_fields(columns, mapping)
    if mapping.keys() & {"response_a", "response_b", "winner"}:
        order = (winner_layout, sides_layout, rated_layout)
    elif mapping.keys() & {"responses", "scores", "response", "score"}:
        order = (rated_layout, sides_layout, winner_layout)
    else:
        order = (sides_layout, winner_layout, rated_layout)
    for find in order:
        found = find(records, columns, fields, mapping, where, min_gap)
        if found is not None:
            break
    else:
        raise UserError(_unknown(where, columns, fields))
    if found.name == ONE_A_ROW:
        rows = grouped_by_prompt(rows, found.fields)
    return found, list(rows)


def _unknown(where: str, columns: Sequence[str], fields: Fields) -> str:
    seen = ", ".join(repr(column[:40]) for column in columns[:25]) + (", ..." if len(columns) > 25 else "")
    if {"chosen", "rejected"} <= fields.keys():
        lack = "none of them is known as the prompt"
    else:
        lack = "they fit no known layout"
    return (
        f"{where}: saw the columns {seen}; {lack}. Name them: --map prompt=question,chosen=good,rejected=bad, "
        "or --map prompt=question,response_a=one,response_b=two,winner=label, "
        "or --map prompt=question,responses=answers,scores=ratings"
    )
