"""ResNet50 on PneumoniaMNIST, tested on CPN X-ray.

Run:     python sweeps/resnet50.py                     (224 px, 100 epochs, batch 128, the report's recipe: needs a GPU)
         python sweeps/resnet50.py --preset laptop     (32 px, and the preset's epochs and batch)
Result:  not run yet.
"""

import sys

from medtune.recipes import BATCH_SIZES, EPOCHS, report_models
from medtune.search.space import Choice, Milestones, Real, SearchSpace
from medtune.sweep import main

SPACE = SearchSpace(
    optimizer=Choice(options=("adam", "adamw", "sgd")),
    lr=Real(low=1e-4, high=1e-2, log=True),
    milestones=Milestones(first=(0.1, 0.5), gap=(0.05, 0.3), count=(1, 3)),
    gamma=Real(low=1e-3, high=0.5, log=True),
    momentum=Real(low=0.0, high=0.99, only_if=("optimizer", "sgd")),
    weight_decay=Real(low=1e-6, high=1e-1, log=True, only_if=("optimizer", ("adamw", "sgd"))),
)

REPORT = tuple(one for one in report_models() if one["model"] == "resnet50")

DEFAULTS = {
    "model": "resnet50",
    "batch_size": BATCH_SIZES["resnet50"],
    "epochs": EPOCHS["resnet50"],
    "first_rung": 0.25,  # the report's first milestone lies at half of the epochs: no second rung before it
}

if __name__ == "__main__":
    sys.exit(main("resnet50", SPACE, REPORT, description=__doc__ or "", defaults=DEFAULTS))
