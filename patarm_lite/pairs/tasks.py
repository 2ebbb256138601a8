"""The task of a pair: from a column through a table, else by two stated heuristics.

The heuristics are words in the source's name, then words of the last user message.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from patarm_lite.errors import UserError
from patarm_lite.pairs.files import stem
from patarm_lite.records import TASKS, Turn

COLUMNS = ("task", "category", "domain", "subsubset", "subset", "section", "source")
"""Columns that may name a task, in the order they are asked."""

TABLE = {
    "chat": ("chat", "general", "helpful", "honest", "other", "focus", "ties", "factuality", "precise_if", "chat_hard"),
    "math": ("math", "mathematics", "prm800k"),
    "code": ("code", "coding", "programming"),
    "safety": ("safety", "harmless", "harmlessness", "donotanswer"),
}
"""Whole values, lower case, spaces and hyphens as `_`."""

PREFIXES = {
    "chat": ("alpacaeval", "mt_bench", "llmbar", "mmlu_pro"),
    "math": ("math_", "gsm8k", "mmlu_pro_math", "livebench_math", "livebench_reasoning"),
    "code": ("hep_", "humaneval", "bigcode/humaneval", "livecodebench", "debugbench", "mbpp"),
    "safety": ("safety_", "refusals_", "xstest_", "harmless_"),
}
"""Beginnings of values; the longest that fits wins. Puzzles (livebench-reasoning) count as math: one right answer."""

_CODE = re.compile(
    r"```|#include|\b(?:python|javascript|typescript|java|c\+\+|c#|golang|rust|sql|html|css|bash|regex|"
    r"leetcode|source code|programming|code snippet|unit tests?)\b|\bdef \w+\(|\bclass \w+\s*[:{]|"
    r"\bwrite (?:a|an|me a|the) (?:\w+ )?(?:function|script|program|query)\b",
    re.IGNORECASE,
)
_MATH = re.compile(
    r"\\(?:frac|sqrt|sum|int|begin\{)|\$[^$\n]{1,80}[=+^\\][^$\n]{0,80}\$|\b(?:equation|integral|derivative|theorem|"
    r"prove that|polynomial|probability that|solve for|triangle|perimeter|remainder when)\b|"
    r"\d[^?]*\bhow (?:many|much|long|far|old)\b|\d\s*[-+*/\u00d7\u00f7^]\s*\d",
    re.IGNORECASE,
)
_SAFETY = re.compile(
    r"\b(?:kill(?:ing)?|murder|bombs?|explosives?|weapons?|guns?|poison|suicide|self.harm|hack(?:ing)?|malware|ransomware|"
    r"steal(?:ing)?|rob(?:bing)?|shoplift\w*|cocaine|heroin|meth|drugs|rape|molest\w*|porn\w*|racis[tm]|nazis?|slurs?|"
    r"terroris[tm]s?|torture|abus(?:e|ing)|kidnap\w*|stalk(?:ing)?|blackmail|launder(?:ing)?|fuck\w*|bitch\w*|nigg\w+)\b",
    re.IGNORECASE,
)
NAME_WORDS = {"chat": "chat", "helpful": "chat", "math": "math", "gsm8k": "math", "code": "code", "coding": "code"} | {
    "safety": "safety",
    "harmless": "safety",
}
"""Words in the name of a file or data set that name a task."""
BY_NAME, BY_WORDS = "the source's name", "words of the last user message"
"""The two heuristics, as the report names them."""


def _fold(value: str) -> str:
    return re.sub(r"[\s\-]+", "_", value.strip().lower())


def task_of_value(value: Any) -> str | None:
    """The task that a column's value names, or None when the table does not have it.

    >>> task_of_value("Math"), task_of_value("xstest-should-refuse"), task_of_value("poetry")
    ('math', 'safety', None)
    """
    if not isinstance(value, str):
        return None
    word = _fold(value)
    for task, words in TABLE.items():
        if word in words:
            return task
    fitting = [(len(start), task) for task, starts in PREFIXES.items() for start in starts if word.startswith(start)]
    return max(fitting)[1] if fitting else None


def task_of_words(prompt: Sequence[Turn]) -> str:
    """The heuristic: words of code, then of mathematics, then of harm in the last user message; chat otherwise.

    >>> task_of_words([Turn("user", "Write a function in Python that adds two numbers")])
    'code'
    >>> task_of_words([Turn("user", "Ann has 3 apples and eats 1. How many are left?")])
    'math'
    """
    last = last_user_message(prompt)
    for task, words in (("code", _CODE), ("math", _MATH), ("safety", _SAFETY)):
        if words.search(last[:20_000]):
            return task
    return "chat"


def task_of_name(name: str) -> str | None:
    """The task a source's name gives: the one its words agree on, or None.

    >>> task_of_name("harmless-base_test"), task_of_name("math_and_code"), task_of_name("pairs")
    ('safety', None, None)
    """
    found = {NAME_WORDS[word] for word in re.split(r"[^a-z0-9]+", name.lower()) if word in NAME_WORDS}
    return found.pop() if len(found) == 1 else None


def last_user_message(prompt: Sequence[Turn]) -> str:
    """The content of the last user turn, or of the last turn when no user speaks."""
    users = [turn.content for turn in prompt if turn.role == "user"]
    return users[-1] if users else prompt[-1].content if prompt else ""


def task_of(
    row: Mapping[str, Any], prompt: Sequence[Turn], columns: Mapping[str, str], task: str, source: str, number: int
) -> tuple[str, str]:
    """The task of one row and, in words, where it comes from.

    Args:
        row: the record. columns: field -> column; `task` in it is one the user named.
        task: one of the tasks for all rows, or "auto".
        source, number: where the row stands.

    Raises:
        UserError: a column the user named for the task holds a value the table does not have.
    """
    if task != "auto":
        return task, "set for all"
    if "task" in columns:
        value = row.get(columns["task"])
        found = task_of_value(value)
        if found is None:
            raise UserError(
                f"{source} row {number}: column {columns['task']!r} holds {str(value)[:40]!r}, which names none of "
                f"{', '.join(TASKS)}; leave task out of --map, or set one task for all with --task"
            )
        return found, f"column {columns['task']!r}"
    by_name = {_fold(str(column)): column for column in row}
    for name in COLUMNS:
        found = task_of_value(row[by_name[name]]) if name in by_name else None
        if found is not None:
            return found, f"column {by_name[name]!r}"
    by_source = task_of_name(stem(source))
    return (by_source, BY_NAME) if by_source else (task_of_words(prompt), BY_WORDS)
