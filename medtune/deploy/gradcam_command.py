"""`medtune gradcam`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro


def gradcam(
    study: tyro.conf.Positional[str],
    trial: tyro.conf.Positional[int | None] = None,
    *,
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None,
    data_dir: Path | None = None,
    external_dir: Path | None = None,
    storage: str | None = None,
) -> None:
    """Draw what a trial's surest hits and misses rest on, as contact sheets.

    Args:
        study: The study's name, or its folder.
        trial: Number of the trial; default: the best.
        output: Folder for the pictures; default: gradcam/ in the study's folder or bucket, for `medtune report` to show.
        data_dir: Folder with the data files; default: $MEDTUNE_DATA, then a user cache folder.
        external_dir: Folder in the external set's layout; default: $MEDTUNE_EXTERNAL_DIR.
        storage: Folder, s3://... or gs://... that holds studies; default: $MEDTUNE_STORAGE, then a user folder.
    """
    from medtune.deploy.sheets import contact_sheets
    from medtune.deploy.source import row_of
    from medtune.results import SYNTHETIC, load_study, sheets_folder

    found = load_study(study, storage)
    row = row_of(found, trial)
    folder = output or sheets_folder(found, row.number)
    for path in contact_sheets(found, row, folder, data_dir=data_dir, external_dir=external_dir):
        print(f"trial {row.number} drawn: {found.keep(path)}")
    if found.record["synthetic"]:
        print(SYNTHETIC)
