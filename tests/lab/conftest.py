"""A lab of hosts for a test, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.hosts import Lab, why_not


@pytest.fixture(scope="session")
def lab_ground() -> None:
    """Skips the test where no lab can be brought up."""
    if reason := why_not():
        pytest.skip(reason)


@pytest.fixture
def lab(lab_ground: None, tmp_path: Path) -> Iterator[Lab]:
    """Hosts cli (with this checkout as ~/medtune), head, w1, w2; nothing runs on them but sshd."""
    with Lab(tmp_path / "lab") as lab:
        lab.install("cli")
        yield lab
