"""`medtune report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

OutputPath = Annotated[Path | None, tyro.conf.arg(aliases=["-o"])]


def report(study: tyro.conf.Positional[str], *, output: OutputPath = None, storage: str | None = None) -> None:
    """Write a study as one HTML page that needs no network: the answer first, then what it rests on.

    Args:
        study: The study's name, or its folder.
        output: File to write; default: report.html in the study's folder or bucket.
        storage: Folder, s3://... or gs://... that holds studies; default: $MEDTUNE_STORAGE, then a user folder.
    """
    from medtune.report.page import FILE, write
    from medtune.results import SYNTHETIC, load_study

    found = load_study(study, storage)
    path = write(found, output or found.folder / FILE)
    print(f"written: {found.keep(path)} ({path.stat().st_size / 1e6:.1f} MB, of which plotly.js is most)")
    if found.record["synthetic"]:
        print(SYNTHETIC)
