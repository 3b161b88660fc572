"""`medmnist:NAME`: train on any 2-D single-label MedMNIST set, test on its own test split, which is no external one."""

from medtune.data import medmnist_npz
from medtune.data.medmnist_pair import MedmnistPair

PREFIX = "medmnist:"


def names() -> tuple[str, ...]:
    """The pairs, as in medmnist's table."""
    return tuple(PREFIX + name for name in medmnist_npz.names())


def refusal(name: str) -> str | None:
    """Why a set of MedMNIST's is no pair."""
    return medmnist_npz.refusal(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else None


def named(name: str) -> MedmnistPair:
    """The pair of this name."""
    return MedmnistPair(name, name.removeprefix(PREFIX))
