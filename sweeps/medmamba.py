"""MedMamba on PneumoniaMNIST, tested on CPN X-ray.

Run:     python sweeps/medmamba.py                     (the report's recipe: needs a GPU)
         python sweeps/medmamba.py --preset laptop     (32 px, minutes on two cores)
Result:  full: not run yet.
         laptop (16 trials, seed 0, two cores, about 9 minutes): val loss 0.322, val AUC 0.945 by the report's base setting,
         2 trials COMPLETE, 14 PRUNED; on a stand-in for CPN X-ray (395 images, not the published set) AUC 0.790
         [0.745, 0.834]. One run of one seed: it shows the way, not the winner.
"""

import sys

from medtune.search.space import Choice, Milestones, Real, SearchSpace
from medtune.sweep import main

SPACE = SearchSpace(
    model=Choice(options=("medmamba_t", "medmamba_s", "medmamba_b")),
    optimizer=Choice(options=("adam", "adamw", "sgd")),
    lr=Real(low=1e-4, high=1e-2, log=True),
    milestones=Milestones(first=(0.1, 0.4), gap=(0.05, 0.3), count=(1, 3)),
    gamma=Real(low=1e-3, high=0.5, log=True),
    momentum=Real(low=0.0, high=0.99, only_if=("optimizer", "sgd")),
)

BASE = {
    "model": "medmamba_s",
    "optimizer": "adam",
    "lr": 1e-3,
    "milestones": (1 / 3, 1 / 2),  # epochs 50 and 75 of 150
    "gamma": 0.1,
}
SGD = {**BASE, "optimizer": "sgd", "momentum": 0.0}
# The report's base setting, then the seven variations of its appendix.
REPORT = (
    BASE,
    {**BASE, "lr": 1e-4},
    {**BASE, "lr": 1e-2},
    {**BASE, "gamma": 1e-3},
    {**BASE, "gamma": 1e-2},
    {**SGD, "lr": 1e-4},
    {**SGD, "gamma": 1e-3},
    {**SGD, "gamma": 1e-2},
)

if __name__ == "__main__":
    sys.exit(main("medmamba", SPACE, REPORT, description=__doc__ or ""))
