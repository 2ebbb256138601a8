"""Replies of an assistant model, from the store or drawn and kept there the moment they are there.

    asking = Replies(model, Drawing(), store, check, "responses")
    found = asking.all([model.read(chat) for chat in chats])

A reply is kept under everything it depends on (the model's fingerprint, what it reads, how is drawn), so a run that was
killed goes on with the same command, equal chats are asked once, and what another model or other settings wrote is
never taken for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from patarm_lite.errors import UserError
from patarm_lite.evals.assistant import Assistant, Drawing, Read, Reply
from patarm_lite.evals.drawn import say
from patarm_lite.progress import Progress, span
from patarm_lite.store import Store, reply_key

BLOCK = 128
"""Replies asked for at once: the last ones of a block are written with idle places beside them, so not too few."""
WARM_UP = 16
"""Chats of the warm-up: some of every length, so that it goes about as fast as the rest."""


class Replies:
    """What a model has written and is asked to write.

    Args:
        check: called between blocks; raises UserError when the model is no longer what it was.
        label: what the replies are, for the progress line.

    Attributes:
        drawn: replies drawn now. seconds: that this took.
    """

    def __init__(self, model: Assistant, drawing: Drawing, store: Store, check: Callable[[], None], label: str) -> None:
        self.model, self.drawing, self.store, self.check, self.label = model, drawing, store, check, label
        self.drawn, self.seconds = 0, 0.0
        self.progress: Progress | None = None

    def known(self, read: Read) -> Reply | None:
        """The reply that the store has."""
        found = self.store.reply(self._key(read))
        return None if found is None else Reply(*found)

    def all(self, reads: Sequence[Read]) -> list[Reply]:
        """A reply to each chat: what the store lacks is drawn, a warm-up first, after which the time is said.

        Raises:
            UserError: a model that can't go on, a store or disk that can't be written. What was drawn is kept.
        """
        missing = list({self._key(read): read for read in reads if self.known(read) is None}.values())
        warm, rest = _spread(missing, WARM_UP)
        self.progress = Progress(f"{self.label}, warm-up", len(warm), even=False) if rest else None
        self.draw(warm)
        if rest:
            each = self.seconds / self.drawn
            left = span(len(rest) * each)
            say(f"  warm-up: {1 / each:.2f} {self.label} a second; the other {len(rest)} take about {left}")
            self.progress = Progress(self.label, len(missing), done=self.drawn, even=False, before=self.seconds)
        for start in range(0, len(rest), BLOCK):
            self.draw(rest[start : start + BLOCK])
        self.check()
        found = [reply for read in reads if (reply := self.known(read)) is not None]
        if len(found) < len(reads):
            raise AssertionError(f"the model gave no reply to {len(reads) - len(found)} chats")
        return found

    def draw(self, reads: Sequence[Read]) -> None:
        """Draw and keep replies, all at once."""
        if not reads:
            return
        self.check()
        began = time.monotonic()
        try:
            for place, reply in self.model.replies(reads, self.drawing):
                now = time.monotonic() - began
                key, mark = self._key(reads[place]), self.model.fingerprint
                self.store.add_reply(key, mark, reply.text, reply.ended, reply.tokens, now)
                self.drawn += 1
                if self.progress is not None:
                    self.progress.at(self.drawn)
        except UserError as error:
            raise UserError(f"{error}; {self._kept()}") from error
        except KeyboardInterrupt:
            say(f"stopped; {self._kept()}")
            raise
        finally:
            self.seconds += time.monotonic() - began

    def missing(self, reads: Iterable[Read]) -> int:
        """How many different chats the store has no reply to."""
        return len({self._key(read) for read in reads if self.known(read) is None})

    def _key(self, read: Read) -> bytes:
        drawing, model = self.drawing, self.model
        return reply_key(model.fingerprint, model.name, read, drawing.max_tokens, drawing.temperature, drawing.seed)

    def _kept(self) -> str:
        if self.store.path is None:
            return "nothing was kept, since there is no store"
        return f"{self.drawn} new {self.label} are kept in {self.store.path}, and the same command goes on from there"


def _spread(reads: Sequence[Read], count: int) -> tuple[list[Read], list[Read]]:
    """Some of all lengths, evenly, and the others.

    >>> _spread([[1], [1, 2], [1, 2, 3], [1, 2, 3, 4]], 2)
    ([[1, 2], [1, 2, 3, 4]], [[1], [1, 2, 3]])
    """
    order = sorted(range(len(reads)), key=lambda place: len(reads[place]))
    count = min(count, len(order))
    chosen = {order[(2 * number + 1) * len(order) // (2 * count)] for number in range(count)}
    return [reads[i] for i in sorted(chosen)], [reads[i] for i in range(len(reads)) if i not in chosen]
