"""`medtune export`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import tyro


def export(
    study: tyro.conf.Positional[str],
    trial: tyro.conf.Positional[int | None] = None,
    *,
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])],
    threshold: str | None = None,
    tolerance: float = 1e-5,
    data_dir: Path | None = None,
    external_dir: Path | None = None,
    storage: str | None = None,
) -> None:
    """Write the bundle to deploy: weights, threshold, figures, model card, programs; verified against the trial.

    Args:
        study: The study's name, or its folder.
        trial: Number of the trial; default: what `medtune choose` chose, else the best.
        output: Folder to write, new or empty.
        threshold: Decision threshold, set on val: sensitivity=0.95, youden, costs=5:1 or argmax; default: the choice's, else
            sensitivity=0.95.
        tolerance: Most that logits may differ from the trial's own, per unit of the largest.
        data_dir: Folder with the data files; default: $MEDTUNE_DATA, then a user cache folder.
        external_dir: Folder in the external set's layout; default: $MEDTUNE_EXTERNAL_DIR.
        storage: Folder, s3://... or gs://... that holds studies; default: $MEDTUNE_STORAGE, then a user folder.
    """
    from medtune.deploy.export import export as write
    from medtune.deploy.source import find
    from medtune.results import SYNTHETIC, load_study

    source = find(load_study(study, storage), trial, threshold)
    bundle = write(source, output, data_dir, external_dir, tolerance, _say)
    print(f"bundle {bundle.version}: trial {source.trial} of study {source.study.name}, {bundle.model}: {source.why}")
    for caution in source.cautions:
        print(f"  {caution}")
    about = bundle.manifest
    differs = max(check["largest_difference"] for check in about["checks"].values())
    print(f"  logits equal the trial's own to {differs:.2g}; program to {about['program']['largest_difference']:.2g}")
    onnx = about["onnx"]
    print(f"  ONNX to {onnx['largest_difference']:.2g}" if onnx["file"] else f"  {onnx['why']}")
    print(f"  read {output / 'MODEL_CARD.md'}\nnext: medtune predict {output} IMAGE...")
    if source.study.record["synthetic"]:
        print(SYNTHETIC)


def _say(words: str) -> None:
    if sys.stderr.isatty():
        print(f"  {words}", file=sys.stderr, flush=True)
