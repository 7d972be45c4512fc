"""One action at a time in a thread, whose error is never lost."""

from __future__ import annotations

import sys
import threading
import traceback
import weakref
from collections.abc import Callable


class Background:
    """A thread whose error is raised by `wait`, or printed when the process ends and nobody has waited.

    The interpreter waits for the thread before it ends.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._errors: list[BaseException] = []
        weakref.finalize(self, _print, self._errors)

    def start(self, action: Callable[[], None]) -> None:
        """Run `action` in a thread. `wait` must have returned True since the last one."""

        def run() -> None:
            try:
                action()
            except BaseException as error:  # noqa: BLE001 - raised again by wait()
                self._errors.append(error)

        self._thread = threading.Thread(target=run, name="am-ckpt save")
        self._thread.start()

    @property
    def is_busy(self) -> bool:
        """Whether the action has not ended yet."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self, seconds: float | None = None) -> bool:
        """Whether the action has ended, waiting up to `seconds` (None: as long as it takes). Raises its error."""
        if self._thread is not None:
            self._thread.join(seconds)
            if self._thread.is_alive():
                return False
            self._thread = None
        if self._errors:
            raise self._errors.pop()
        return True


def _print(errors: list[BaseException]) -> None:
    for error in errors:
        print("am_ckpt: this error of a save was never asked for; call Checkpointer.wait()", file=sys.stderr)
        traceback.print_exception(error)
