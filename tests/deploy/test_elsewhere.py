"""A bundle goes to others: it names no folder of the machine that it was made on."""

import json
from dataclasses import replace

import pytest
import torch

from medtune.data import load_pair
from medtune.deploy import export
from medtune.deploy.elsewhere import named
from medtune.deploy.source import find


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("/home/me/data/a.npz has MD5 12, the official file has 34", "a.npz has MD5 12, the official file has 34"),
        ("/mnt/x/theirs: 3 images were not 256x256 (a.png, ...)", "theirs: 3 images were not 256x256 (a.png, ...)"),
        ("DataError: cannot read '/tmp/x y/b.png' (OSError)", "DataError: cannot read 'x y/b.png' (OSError)"),
        ("~/weights/w.pt", "w.pt"),
        ("../w.pt and ./v.pt", "w.pt and v.pt"),
        ("val/auc of PNEUMONIA and/or 1/2, images a second", "val/auc of PNEUMONIA and/or 1/2, images a second"),
        ("s3://bucket/studies", "s3://bucket/studies"),
        ("timm", "timm"),
    ],
)
def test_paths_become_names(text, left):
    assert named(text) == left


def test_what_is_known_of_a_bundle_names_no_folder(trained):
    source = find(trained, None, None)
    source = replace(source, cautions=("trial 1: 2 of its runs failed (cannot read /home/me/a.png)",))
    data = replace(load_pair("synthetic"), warnings=("/home/me/pneumoniamnist.npz has another MD5",))
    about = export._about(source, data, torch.device("cpu"), {})
    assert about["data"]["warnings"] == ["pneumoniamnist.npz has another MD5"]
    assert about["cautions"] == ["trial 1: 2 of its runs failed (cannot read a.png)"]
    assert "/home" not in json.dumps(about)
