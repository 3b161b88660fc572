"""The ledger's file as its one writer sees it: several facts in one write, so that they are on disk together."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Generator, Iterator
from typing import Any

from optuna.storages.journal._storage import JournalOperation

from medtune.errors import StudyError
from medtune.storage.journal import PatientJournal
from medtune.storage.patience import patiently


class DriverJournal(PatientJournal):
    """Optuna's journal, with `together`; it keeps no list of where each line began, which only grows."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._depth = 0
        self._pending: list[dict[str, Any]] = []
        """Lines that count already in this process and are not in the file yet."""
        self._read = 0
        """Lines of the file that this process knows."""

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What is written inside goes to the file in one write at the end, or at the next `flush`.

        What an exception leaves unwritten goes before all that is written later.
        """
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
        if not self._depth:
            self.flush()

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        if self._depth:
            # As they will be read back: JSON has no tuples.
            self._pending += json.loads(json.dumps(logs))
        else:
            self.flush()
            super().append_logs(logs)

    def flush(self) -> None:
        """See to it that all is on disk. Raises StudyError if another process added trials meanwhile."""
        if not self._pending:
            return
        self._require_no_strangers()
        super().append_logs(self._pending)
        self._read += len(self._pending)
        self._log_number_offset = {self._read: self._size()}
        self._pending = []

    def _require_no_strangers(self) -> None:
        """Trials go by their place in the file. A note that Optuna's dashboard put there does no harm."""
        if self._size() == self._log_number_offset[self._read]:
            return
        strange = super().read_logs(self._read)
        if any(log["op_code"] == JournalOperation.CREATE_TRIAL for log in strange):
            raise StudyError(
                f"another process added trials to the ledger {self._file_path} while this one was adding its own. "
                "Start the study again: it goes on with all of them"
            )

    def _size(self) -> int:
        """In bytes, once the file can be reached."""
        return patiently(f"the ledger {self._file_path}", lambda: os.stat(self._file_path).st_size)

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        if self._pending:
            yield from self._pending[log_number_from - self._read :]
            return
        self._size()
        number = log_number_from
        for log in super().read_logs(log_number_from):
            number += 1
            yield log
        self._read = number
        self._log_number_offset = {number: self._log_number_offset[number]}
