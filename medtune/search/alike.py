"""When trials fail one like the other, it is the configuration or the data, not the trials."""

from __future__ import annotations

import re

_PATH = re.compile(r"(?:[A-Za-z]:)?[\w.~-]*[/\\][\w./\\~-]*")
_HEX = re.compile(r"\b(?:0x)?[0-9a-fA-F]{8,}\b")
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")


def kind_of(cause: str) -> str:
    """A cause of failure without what differs from trial to trial: paths, hexadecimal ids and numbers."""
    for pattern, mark in ((_PATH, "PATH"), (_HEX, "ID"), (_NUMBER, "N")):
        cause = pattern.sub(mark, cause)
    return cause


class FirstFailures:
    """Follows the ends of a launch's first trials, until one of them is no failure like the others."""

    def __init__(self, enough: int) -> None:
        """`enough`: alike failures that say it is not the trials; 0: never said."""
        self._enough = enough
        self._kinds: list[str] = []
        self._differ = enough == 0

    def end(self, cause: str | None) -> str | None:
        """Take in the end of a trial, of a failed one with its cause; returns why the study should stop, if it should."""
        if self._differ:
            return None
        self._kinds.append(kind_of(cause) if cause else "")
        self._differ = not cause or self._kinds[-1] != self._kinds[0]
        if self._differ or len(self._kinds) < self._enough:
            return None
        return (
            f"the first {self._enough} trials that ended all failed alike, so it is the configuration or the data, not the "
            f"trials. The last: {cause}. Mend it and give the same command again, which tries {self._enough} more; "
            "--alike-failures 0 goes on whatever fails"
        )
