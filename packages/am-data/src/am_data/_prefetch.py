"""One thread that prepares steps ahead of the one in use.

The thread and its reader share a `_Shared` alone, and the thread holds no reference to the reader: a reader that is
closed, collected, or still there when the interpreter ends, stops the thread.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item")

# How long a closed reader waits for the thread, which may be inside a user's dataset that gives nothing for long.
_PATIENCE_SECONDS = 5.0


@dataclass(frozen=True)
class Outcome(Generic[Item]):
    """What asking an iterator for its next item came to: the item, an end (None), or an error kept for later."""

    item: Item | None = None
    error: BaseException | None = None

    @classmethod
    def of(cls, items: Iterator[Item]) -> Outcome[Item]:
        """Ask now; whatever is raised is kept, to be raised where the item was due."""
        try:
            return cls(next(items, None))
        except BaseException as error:  # noqa: BLE001
            return cls(error=error)

    @property
    def ended(self) -> bool:
        """Whether there was no next item, and no error."""
        return self.item is None and self.error is None

    def raise_error(self) -> None:
        """Raise what asking for the item raised, if it did, with the traceback from there."""
        if self.error is not None:
            raise self.error


@dataclass
class _Shared(Generic[Item]):
    items: Generator[Item]
    number: int
    # Its lock is reentrant: a collection inside of it may end up in `_stop`.
    condition: threading.Condition = field(default_factory=threading.Condition)
    ready: deque[Outcome[Item]] = field(default_factory=deque)
    stopped: bool = False


class Prefetcher(Iterator[Item]):
    """The items of a generator, up to `number` of them made ahead by one thread; errors come in their place."""

    def __init__(self, items: Generator[Item], number: int) -> None:
        self._shared = _Shared(items, number)
        # A daemon: a thread inside a user's dataset that gives nothing must not keep the interpreter from ending.
        self._thread = threading.Thread(target=_prepare, args=(self._shared,), name="am-data-prefetch", daemon=True)
        self._close = weakref.finalize(self, _stop, self._shared, self._thread)
        self._thread.start()

    def __next__(self) -> Item:
        shared = self._shared
        with shared.condition:
            shared.condition.wait_for(lambda: shared.ready or shared.stopped)
            outcome = shared.ready.popleft() if shared.ready else Outcome()
            shared.condition.notify_all()
        if outcome.item is None:
            self.close()
            outcome.raise_error()
            raise StopIteration
        return outcome.item

    def close(self) -> None:
        """Stop the thread and wait for it, at most some seconds; what it has made ahead is dropped."""
        self._close()

    def join(self) -> None:
        """Wait until a closed prefetcher's thread has left the generator."""
        self._thread.join()


def _prepare(shared: _Shared[Item]) -> None:
    ended = False
    while not ended:
        with shared.condition:
            shared.condition.wait_for(lambda: shared.stopped or len(shared.ready) < shared.number)
            if shared.stopped:
                break
        outcome = Outcome.of(shared.items)
        ended = outcome.item is None
        with shared.condition:
            shared.ready.append(outcome)
            shared.condition.notify_all()
    # In the thread that ran it: what a user's stream has open may belong to that thread.
    shared.items.close()


def _stop(shared: _Shared[Item], thread: threading.Thread) -> None:
    with shared.condition:
        shared.stopped = True
        shared.ready.clear()
        shared.condition.notify_all()
    # The collector may run this in the thread itself.
    if thread is not threading.current_thread():
        thread.join(_PATIENCE_SECONDS)
