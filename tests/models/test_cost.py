"""What models cost, against published figures."""

from __future__ import annotations

import json
import re

import pytest

from medtune import cli
from medtune.models import available
from medtune.models.cost import cost, source

MULTIPLY_ADDS = {
    "medmamba_t": 2.24,
    "medmamba_s": 3.04,
    "medmamba_b": 6.68,
    "medvit_small": 5.86,
    "medvit_base": 8.36,
    "medvit_large": 10.86,
    "resnet50": 4.09,
}
"""G, of convolutions and matrix products at 224x224 with 1000 classes."""


@pytest.mark.parametrize("name, expected", MULTIPLY_ADDS.items())
def test_multiply_adds(name, expected) -> None:
    assert round(cost(name, 224, 1000).multiply_adds / 1e9, 2) == expected


@pytest.mark.parametrize("name, published", [("vmamba_t", 4.9), ("vmamba_s", 8.7), ("vmamba_b", 15.4)])
def test_vmamba_without_its_scan_is_a_little_less(name, published) -> None:
    """The published figures count the scan as well."""
    assert 0.96 * published < cost(name, 224, 1000).multiply_adds / 1e9 < published


@pytest.mark.parametrize("name", available())
def test_every_model_says_its_source(name) -> None:
    assert re.fullmatch(r"\S.* \(.*\d{4}.*\)", source(name))  # name (authors and year, where to find it)


def test_command(capsys, monkeypatch) -> None:
    names = ("medvit_small", "vim_tiny")  # all of them take long to count
    monkeypatch.setattr("medtune.models.available", lambda: names)
    assert cli.main(["models", "--json", "--image-size", "32", "--classes", "9"]) == 0
    for name, item in zip(names, json.loads(capsys.readouterr().out), strict=True):
        assert item == {"name": name, **cost(name, 32, 9)._asdict(), "source": source(name)}
    assert cli.main(["models"]) == 0
    table = capsys.readouterr().out
    assert "31.1 M" in table and "5.86 G" in table and "one image of 224x224 px" in table and "with 2 classes" in table


@pytest.mark.parametrize("wrong", [["--image-size", "16"], ["--classes", "0"]])
def test_command_says_what_is_wrong(capsys, wrong) -> None:
    assert cli.main(["models", *wrong]) == 2
    assert "must be at least" in capsys.readouterr().err
