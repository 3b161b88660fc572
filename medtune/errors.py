"""The errors a user can meet. Each message says what is wrong, the value, the rule and the way out."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class MedtuneError(Exception):
    """Something the user can mend; the command line prints its message without a traceback."""


class ConfigError(MedtuneError, ValueError):
    """A setting that is unknown, out of range or at odds with another."""


class DataError(MedtuneError):
    """Data that are missing, damaged or not what they should be."""


class DataMissing(DataError):
    """Data that are not there at all, as against damaged ones."""


class CheckpointError(MedtuneError):
    """A checkpoint that is missing, damaged or of another model."""


class ImageError(MedtuneError):
    """An image that cannot be read, or is none."""


class BundleError(MedtuneError):
    """A bundle that is missing, was changed since it was written, or cannot be written as asked."""


class ServeError(MedtuneError):
    """Serving that cannot be started, or cannot go on."""


class StudyError(MedtuneError):
    """A study that cannot be started, continued or read as asked."""


class TrainingDiverged(MedtuneError):
    """A loss that is not finite: the trial's own failure, not the machine's."""


class MachineFault(MedtuneError):
    """The process or its device is not fit for another trial; no trial's own fault."""


class Leaving(MachineFault):
    """The machine is about to be taken away."""


class Superseded(MachineFault):
    """An attempt that goes on in another process, as its own was taken for lost."""


class StorageFault(MachineFault):
    """Storage that failed for longer than the study waits for it: no trial's own fault."""


class LaunchBroke(Exception):
    """What schedules the trials ended in an error that is neither the study's nor the user's, but Ray's."""


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """Message for a name that is not one of `known`, with the nearest right one."""
    choices = sorted(known)
    near = get_close_matches(name, choices, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {name!r}.{hint} Known: {', '.join(choices)}"
