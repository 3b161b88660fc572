"""What is done when storage fails: wait and try again, here and nowhere else.

A process that writes for a study holds one `Patience`; whatever it writes goes through `patiently`. A full disk, a server
that does not answer or a folder that is not mounted then stops the process where it stands until it is over or too long.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from medtune.errors import StorageFault

T = TypeVar("T")

TOLD_SECONDS = 3.0
"""A failure that is over sooner is nobody's business."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 5.0
_LOOK = 0.2


class ToldToStop(StorageFault):
    """Nobody waits any more, for another reason than that it lasted."""


class Patience:
    """Tries again for `seconds` while an action raises OSError."""

    def __init__(
        self,
        seconds: float,
        *,
        waits: Callable[[str], object] = lambda text: None,
        went_on: Callable[[str], object] = lambda text: None,
        give_up: Callable[[], bool] = lambda: False,
    ) -> None:
        """`waits`, `went_on`: hear, in words, of a failure that lasts and of its end. `give_up`: whether to wait no more."""
        self.seconds = seconds
        self.waits = waits
        self.went_on = went_on
        self.give_up = give_up

    def __call__(self, what: str, action: Callable[[], T]) -> T:
        """The action's result. Raises StorageFault when it fails for longer, with the system's reason."""
        try:
            return action()
        except OSError as error:
            return self._again(what, action, reason(error))

    def _again(self, what: str, action: Callable[[], T], why: str) -> T:
        started, told, pause = time.monotonic(), False, _FIRST_PAUSE
        while (waited := time.monotonic() - started) < self.seconds:
            if waited >= TOLD_SECONDS and not told:
                told = True
                self.waits(f"storage fails: {what}: {why}; trying again for {self.seconds / 60:.3g} min")
            self._sleep(min(pause, self.seconds - waited))
            pause = min(_LONGEST_PAUSE, 1.5 * pause)
            try:
                result = action()
            except OSError as error:
                why = reason(error)
                continue
            if told:
                self.went_on(f"storage works again after {time.monotonic() - started:.0f} s: {what} ({why} before)")
            return result
        raise StorageFault(f"{what}: {why}, for {time.monotonic() - started:.0f} s (--storage-patience {self.seconds:g})")

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if self.give_up():
                raise ToldToStop("told to stop while storage failed")
            time.sleep(min(_LOOK, left))


def reason(error: OSError) -> str:
    """The system's or the server's word for what is wrong, on one line."""
    text = str(error.strerror or error)
    return " ".join(text.split())


_current: Patience | None = None


@contextlib.contextmanager
def held(patience: Patience) -> Iterator[None]:
    """Have this process write with `patience`."""
    global _current
    before, _current = _current, patience
    try:
        yield
    finally:
        _current = before


def hold(patience: Patience) -> None:
    """Have this process write with `patience` from now on."""
    global _current
    _current = patience


def patiently(what: str, action: Callable[[], T]) -> T:
    """Do what writes to storage, with the process's patience; without one, its error is the caller's."""
    return action() if _current is None else _current(what, action)
