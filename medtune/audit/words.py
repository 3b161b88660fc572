"""An audit in one sentence, and where it stands: beside every external figure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LEAKED = "LEAKED"
"""How the sentence begins where external figures cannot be taken at their word."""


def words(record: Mapping[str, Any]) -> str:
    """What an audit found, in one sentence."""
    return "; ".join([_of_external(record), *_of_own(record)])


def _of_external(record: Mapping[str, Any]) -> str:
    if record["own_test"]:
        return "NO EXTERNAL SET: the external test is the training set's own test split"
    count, total = len(record["external_leaked"]), record["images"]["external"]
    baseline = record["baseline"]["near"] if not record["usual"] else record["baseline"]["exact"]
    usual = f"usual: {percent(baseline)}, of test in train"
    if record["usual"]:
        usual += (
            f"; exact copies alone are counted, as {percent(record['baseline']['correlated'])} of the test images correlate "
            f"above {record['threshold']:g} with one of train"
        )
    share = count / total
    if share < 0.01 or share <= 3 * baseline:
        return f"no leak found: {count} of {total} external images have a near-duplicate in the training set ({usual})"
    where = ", ".join(f"{percent(_near(record, name) / total)} in {name}" for name in ("train", "val", "test"))
    told = "say little about another hospital" if share >= 0.5 else "are better than another hospital's would be"
    found = f"{percent(share)} of the external images have a near-duplicate in the training set ({where}; {usual})"
    return f"{LEAKED}: {found}: external figures {told}"


def _near(record: Mapping[str, Any], name: str) -> int:
    return int(record["leaked"][f"external in {name}"]["near"])


def _of_own(record: Mapping[str, Any]) -> list[str]:
    """Copies of training images in val and test, and images with two labels."""
    counts = {name: record["leaked"][f"{name} in train"]["exact"] for name in ("val", "test")}
    copies = [f"{count} of {record['images'][name]} {name} images" for name, count in counts.items() if count]
    conflicts = sum(found["other_label"] for found in record["leaked"].values())
    parts = [f"{' and '.join(copies)} are copies of training images"] if copies else []
    return [*parts, f"{conflicts} near-duplicates have another label"] if conflicts else parts


def percent(share: float) -> str:
    """`97 %`, `0.6 %`, `0 %`."""
    return f"{100 * share:.{0 if share == 0 or share >= 0.095 else 1}f} %"
