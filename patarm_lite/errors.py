"""The one error a user is meant to see, and the exact pip line for a missing extra.

Policy: bad input raises `UserError`; `cli.main` prints it as one `error:` line on stderr and exits with 2.
Everything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """What was found (value and place), why it can't work, what to type next: one line.

    Example:
        >>> raise UserError("recipe 'tinny' not found. Did you mean 'tiny'?")
        Traceback (most recent call last):
        ...
        patarm_lite.errors.UserError: recipe 'tinny' not found. Did you mean 'tiny'?
    """


def missing_extra(extra: str, module: str = "") -> UserError:
    """The error for an optional dependency that is not installed, with the line that installs it.

    >>> str(missing_extra("train", "torch"))
    "torch is not installed and this needs it; type: pip install 'patarm-lite[train]'"
    """
    what = module or f"the '{extra}' extra"
    return UserError(f"{what} is not installed and this needs it; type: pip install 'patarm-lite[{extra}]'")


def nearest(word: str, known: Iterable[str]) -> str:
    """' Did you mean ...?' for the closest known word, or '' when none is close.

    >>> nearest("tinny", ["tiny", "smoke"])
    " Did you mean 'tiny'?"
    >>> nearest("xyz", ["tiny"])
    ''
    """
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""
