"""What was chosen in a study, as it is kept beside it: `choice.json`, in the study's folder or its bucket."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from medtune.errors import StudyError
from medtune.progress import some
from medtune.record import plain, read_json, write_json
from medtune.storage.patience import reason

if TYPE_CHECKING:  # results imports this module
    from medtune.results import Study

FILE = "choice.json"


def write_choice(study: Study, choice: dict[str, Any]) -> None:
    """Keep it; the one before goes. Raises StudyError where it cannot be written."""
    try:
        if study.bucket:
            study.bucket.write(FILE, json.dumps(plain(choice), indent=1).encode())
        else:
            write_json(study.folder / FILE, choice)
    except OSError as error:
        raise StudyError(f"cannot write {FILE} to {study.where}: {reason(error)}") from None


def read_choice(study: Study) -> dict[str, Any] | None:
    """The choice made last (see `medtune.choose.build.choice`); None while none was made. Raises StudyError."""
    if not study.bucket:
        return read_json(study.folder / FILE)
    try:
        data = study.bucket.read(FILE)
    except OSError as error:
        raise StudyError(f"cannot read {FILE} in {study.where}: {reason(error)}") from None
    return json.loads(data) if data else None


def mention(study: Study) -> str | None:
    """One line on the study's choice, for the other commands; None while there is none."""
    choice = read_choice(study)
    if choice is None:
        return None
    chosen = next(one for one in choice["finalists"] if one["trial"] == choice["chosen"]["trial"])
    words = f"trial {chosen['trial']}, {choice['by']} {chosen['mean']:.4f} over {some(len(chosen['runs']), 'fresh seed')}"
    if choice["external_labels_used"]:
        words += ", CHOSEN WITH EXTERNAL LABELS"
    newer = sum(row.state == "COMPLETE" for row in study.rows) - choice["candidates"]
    if newer > 0:
        words += f"; not considered: {some(newer, 'trial')} trained to the end since"
    return words
