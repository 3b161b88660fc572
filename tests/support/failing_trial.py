"""Played trials that all fail for the same reason, each with numbers of its own. Importable: Ray's processes import it."""

from __future__ import annotations

from benchmarks.played import PlayedAttempt, PlayedTrial
from medtune.search.conductor import Report
from medtune.trial import Attempt, failed


class FailingAttempt(PlayedAttempt):
    """Fails in its first epoch."""

    def next_report(self) -> Report:
        """As an attempt that met an error."""
        number = self.spec.number
        report = failed(self._say("fail", 0.0), OSError(f"/data/{number}.png: {number * 10} bytes are missing"))
        self.record.final(report.to_dict())
        return report


class FailingTrial(PlayedTrial):
    """The actor of such a trial."""

    attempt_class: type[Attempt] = FailingAttempt
