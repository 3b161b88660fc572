"""MedViT on PneumoniaMNIST, tested on CPN X-ray.

Run:     python sweeps/medvit.py                     (224 px, 100 epochs, batch 128, the report's recipe: needs a GPU)
         python sweeps/medvit.py --preset laptop     (32 px, and the preset's epochs and batch)
Result:  not run yet.
"""

import sys

from medtune.recipes import BATCH_SIZES, EPOCHS, MEDVIT, report_models
from medtune.search.space import Choice, Milestones, Real, SearchSpace
from medtune.sweep import main

SPACE = SearchSpace(
    model=Choice(options=MEDVIT),
    optimizer=Choice(options=("adam", "adamw", "sgd")),
    lr=Real(low=1e-4, high=1e-2, log=True),
    milestones=Milestones(first=(0.1, 0.5), gap=(0.05, 0.3), count=(1, 3)),
    gamma=Real(low=1e-3, high=0.5, log=True),
    momentum=Real(low=0.0, high=0.99, only_if=("optimizer", "sgd")),
    clip_norm=Choice(options=(None, 1.0)),
    patch_momentum=Choice(options=(False, True), only_if=("model", MEDVIT)),
)

# The report's three, the smallest first; it clipped medvit_large alone.
REPORT = tuple(one for model in MEDVIT for one in report_models() if one["model"] == model)

DEFAULTS = {
    "model": "medvit_small",
    "batch_size": BATCH_SIZES["medvit_small"],
    "epochs": EPOCHS["medvit_small"],
    "first_rung": 0.25,  # the report's first milestone lies at half of the epochs: no second rung before it
}

if __name__ == "__main__":
    sys.exit(main("medvit", SPACE, REPORT, description=__doc__ or "", defaults=DEFAULTS))
