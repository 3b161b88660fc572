"""A pair's verdict, kept between studies; and a study's, in its folder."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medtune.data import PairData
from medtune.data.arrays import short
from medtune.data.folders import user_folder
from medtune.data.pair import external_positions
from medtune.record import read_json, write_json

if TYPE_CHECKING:  # results imports this module
    from medtune.results import Study

FILE = "audit.json"
THRESHOLD = 0.95
"""Correlation at 28 px above which two images are near-duplicates."""
QUICK = 10**12
"""Multiply-adds up to which a study audits its data at its start."""
_METHOD = "1"  # part of the key: raise it when what an audit finds changes

Say = Callable[[str], object]


def verdict_of(study: Study) -> dict[str, Any] | None:
    """A study's audit, with its keys as in `medtune.audit`; None where there was none."""
    return read_json(study.folder / FILE)


def sentence(study: Study) -> str | None:
    """What stands beside a study's external figures; None for generated images, of which no figure means anything."""
    if study.record["synthetic"]:
        return None
    found = verdict_of(study)
    return found["words"] if found else f"not audited for near-duplicates: medtune data audit --study {study.name}"


def kept_audit(data: PairData, threshold: float, say: Say) -> dict[str, Any]:
    """The audit of a whole pair, from the user's cache folder where it was made before."""
    from medtune.audit.search import audit  # imports torch, which reading a study back does without

    if (known := known_audit(data, threshold)) is not None:
        return known
    path, found = _cache(data, threshold), audit(data, threshold, say)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, found)
    return found


def known_audit(data: PairData, threshold: float) -> dict[str, Any] | None:
    """The audit of a whole pair, if it was made before."""
    return read_json(_cache(data, threshold))


def at_start(folder: Path, data: PairData, external_limit: int | None, say: Say) -> None:
    """Leave the verdict in a study's folder, where it is known or quick to find out."""
    from medtune.audit.search import cost

    known = read_json(folder / FILE)
    if data.synthetic or (known and known["digests"] == data.fingerprint):
        return
    if known_audit(data, THRESHOLD) is None:
        if cost(data) > QUICK:
            return
        say("  looking for near-duplicates in train, val, test and external images, once for these")
    with contextlib.suppress(OSError):
        write(folder, kept_audit(data, THRESHOLD, lambda text: None), data, external_limit)


def write(folder: Path, found: dict[str, Any], data: PairData, external_limit: int | None) -> None:
    """Leave a pair's audit in a study's folder. Raises OSError."""
    write_json(folder / FILE, of_limited(found, data, external_limit))


def of_limited(found: dict[str, Any], data: PairData, external_limit: int | None) -> dict[str, Any]:
    """A whole pair's audit with positions among the `external_tested` images that `limit` keeps: those of predictions."""
    chosen = external_positions(data, external_limit).tolist()
    place = {whole: position for position, whole in enumerate(chosen)}
    lists = {
        name: [place[whole] for whole in found[name] if whole in place] for name in ("external_leaked", "external_seen")
    }
    return {**found, **lists, "external_tested": len(chosen)}


def _cache(data: PairData, threshold: float) -> Path:
    key = short(json.dumps([_METHOD, data.name, data.external_name, data.fingerprint, threshold]))
    return user_folder() / "audits" / f"{key}.json"
