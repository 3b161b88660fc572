"""External figures without the images that have near-duplicates in the training set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from medtune.audit.verdict import THRESHOLD, kept_audit, known_audit, of_limited
from medtune.data import PairData
from medtune.errors import StudyError
from medtune.predictions import Predictions

LEVELS = {
    "external_seen": "in train or val, which models are trained and chosen on",
    "external_leaked": "anywhere in the training set, its own test split included",
}


def without_leaked(
    predictions: Predictions, verdict: Mapping[str, Any], *, resamples: int, cpn: bool
) -> list[dict[str, Any]]:
    """Figures `external/*` and `external_matched/*` with intervals, for each of `LEVELS` that drops other images.

    Each has `words`, `dropped` and `left` beside its `figures`; `cpn`: with copies named `cpn/*`.
    Raises StudyError where the audit is of another number of images than the predictions.
    """
    found: list[dict[str, Any]] = []
    for level, where in LEVELS.items():
        leaked = verdict[level]
        if found and len(leaked) == found[-1]["dropped"]:
            continue
        left = verdict["external_tested"] - len(leaked)
        words = f"without the {len(leaked)} images that have near-duplicates {where}: {left} images"
        figures: dict[str, Any] = {"external/n": left}
        for prefix in ("external", "external_matched"):
            if left and prefix in predictions:
                figures |= _figures(predictions, prefix, leaked, verdict["external_tested"], resamples)
        if cpn:
            figures |= {f"cpn{k.removeprefix('external')}": v for k, v in figures.items() if not k.endswith("/n")}
        found.append({"words": words, "dropped": len(leaked), "left": left, "figures": figures})
    return found


def leak_figures(
    data: PairData, predictions: Predictions, external_limit: int | None, resamples: int, drop: bool
) -> dict[str, Any]:
    """`leaks`, the verdict on a whole pair if it is known, and with `drop` `without_leaked`: then it is found out."""
    if data.synthetic:
        return {}
    audit = kept_audit(data, THRESHOLD, lambda text: None) if drop else known_audit(data, THRESHOLD)
    if audit is None:
        return {"leaks": "not audited for near-duplicates: medtune data audit, or --drop-leaked"}
    found: dict[str, Any] = {"leaks": audit["words"]}
    if drop:
        verdict = of_limited(audit, data, external_limit)
        found["without_leaked"] = without_leaked(predictions, verdict, resamples=resamples, cpn=data.verified_cpn)
    return found


def _figures(predictions: Predictions, prefix: str, leaked: list[int], tested: int, resamples: int) -> dict[str, Any]:
    import torch

    from medtune.evaluate import figures

    one = predictions[prefix]
    if len(one.labels) != tested:
        raise StudyError(
            f"the audit is of {tested} external images, these predictions of {len(one.labels)}: they cannot be matched. "
            "Audit the study's data anew with `medtune data audit --study NAME`"
        )
    keep = np.setdiff1d(np.arange(tested), leaked)
    return figures(torch.from_numpy(one.logits[keep]), one.labels[keep], prefix, loss=False, resamples=resamples)
