"""Every model there is, on PneumoniaMNIST, tested on CPN X-ray: which family, trained how.

Run:     python sweeps/all_models.py                     (224 px; needs a GPU)
         python sweeps/all_models.py --preset laptop     (32 px, and the preset's epochs and batch for all)
         python sweeps/all_models.py --model vmamba_t    (one model, with its family's epochs and batch)
Result:  full: not run yet.
         laptop (16 trials, seed 0, two cores, about 10 minutes, commit 6a82617): val loss 0.322, val AUC 0.938 by
         MedMamba-s with Adam, lr 5e-4; 2 trials COMPLETE, 14 PRUNED; AUC 0.758 [0.710, 0.805] on a stand-in for CPN X-ray
         (395 images, not the published set). One run of one seed: it shows the way, not the winner.

Batch size and epochs are the report's for the model's family; VMamba and Vim, which it did not train, have MedMamba's.
ASHA compares trials at equal fractions of their own epochs.
"""

import sys

from medtune.recipes import BATCH_SIZES, EPOCHS, MEDVIT, MODELS, report_models
from medtune.search.space import Choice, Following, Milestones, Real, SearchSpace
from medtune.sweep import main

SPACE = SearchSpace(
    model=Choice(options=MODELS),
    batch_size=Following(by="model", values=BATCH_SIZES),
    epochs=Following(by="model", values=EPOCHS),
    optimizer=Choice(options=("adam", "adamw", "sgd")),
    lr=Real(low=1e-4, high=1e-2, log=True),
    milestones=Milestones(first=(0.1, 0.5), gap=(0.05, 0.3), count=(1, 3)),
    gamma=Real(low=1e-3, high=0.5, log=True),
    momentum=Real(low=0.0, high=0.99, only_if=("optimizer", "sgd")),
    imbalance=Choice(options=("none", "weighted", "balanced")),
    augmentation=Real(low=0.0, high=1.0),
    patch_momentum=Choice(options=(False, True), only_if=("model", MEDVIT)),
)

# The report's seven models, the best of them first.
REPORT = tuple(sorted(report_models(), key=lambda one: one["model"] != "medmamba_s"))

# MedViT's first milestone lies at half of its epochs: no second rung before it.
DEFAULTS = {"first_rung": 0.25}

if __name__ == "__main__":
    sys.exit(main("all-models", SPACE, REPORT, description=__doc__ or "", defaults=DEFAULTS))
