"""Progress of a stage on stderr."""

from __future__ import annotations

import sys
import time


class Progress:
    """One line on stderr: redrawn on a terminal, else printed at most every `every` seconds.

    `even`: whether steps take about the same time, so that two of them foretell all. `before`: seconds that the steps
    `done` so far took, where that was measured: they foretell the rest too.
    """

    def __init__(
        self, label: str, total: int, done: int = 0, every: float = 15.0, even: bool = True, before: float = 0.0
    ) -> None:
        self.label, self.total, self.start, self.every = label, total, done, every
        self.before, self.measured = before, done if before else 0
        self.began = self.shown = time.monotonic()
        self.predicted = not even
        self.terminal = sys.stderr.isatty()

    def at(self, done: int, words: str = "") -> None:
        now = time.monotonic()
        count = done - self.start
        left = (now - self.began + self.before) / max(count + self.measured, 1) * (self.total - done)
        if count >= 2 and not self.predicted:
            self.predicted = True
            whole = (now - self.began) / count * (self.total - self.start)
            self._say(f"{self.label}: this takes {span(whole)} ({self.total - self.start} steps)", keep=True)
        if self.terminal or now - self.shown >= self.every or done == self.total:
            self.shown = now
            self._say(f"{self.label} {done}/{self.total}  {words}  {span(left)} left", keep=done == self.total)

    def _say(self, line: str, keep: bool) -> None:
        if self.terminal:
            sys.stderr.write("\r\x1b[K" + line + ("\n" if keep else ""))
        else:
            sys.stderr.write(line + "\n")
        sys.stderr.flush()


def span(seconds: float) -> str:
    """A time in the unit that a person would use.

    >>> span(75), span(600), span(9000)
    ('75 s', '10.0 min', '2.5 h')
    """
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.1f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )
