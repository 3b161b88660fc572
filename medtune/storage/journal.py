"""The ledger's file, written so that a disk that is full or gone leaves no half line behind."""

from __future__ import annotations

import contextlib
import os
from typing import Any

from optuna.storages.journal import JournalFileBackend

from medtune.storage.patience import patiently


class PatientJournal(JournalFileBackend):
    """Optuna's journal for the one process that writes it: what could not be written whole is cut off and written again."""

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Raises StorageFault, or OSError where the process has no patience; the file is then as it was before."""
        size = patiently(f"the ledger {self._file_path}", lambda: os.stat(self._file_path).st_size)

        def append() -> None:
            try:
                super(PatientJournal, self).append_logs(logs)
            except OSError:
                with contextlib.suppress(OSError):
                    os.truncate(self._file_path, size)
                raise

        def whole() -> None:
            # The cut may have failed as well, on a folder that was gone.
            if os.stat(self._file_path).st_size != size:
                os.truncate(self._file_path, size)
            append()

        patiently(f"the ledger {self._file_path}", whole)
