"""MedMamba on PneumoniaMNIST, tested on CPN X-ray.

Run:     python sweeps/medmamba.py                     (the report's recipe: needs a GPU)
         python sweeps/medmamba.py --preset laptop     (32 px, minutes on two cores)
Result:  full: two trials, one after the other, in 6.6 minutes on one H200 (at 237bfa4, 2026-12-01; 6.5 GPU-minutes). The
         first, MedMamba-s by the report's base setting (adam, lr 0.001), ran its 150 epochs in 5.2 minutes: val loss 0.078,
         val AUC 0.994, OA 0.968 at epoch 68. On a stand-in for CPN X-ray (395 images, not the published set, 97 % of
         them near-duplicates of PneumoniaMNIST's) brought to training resolution AUC 0.968 [0.952, 0.981], OA 0.906
         [0.878, 0.937]; as they are AUC 0.916 [0.888, 0.942], OA 0.544 [0.527, 0.565]. The second stood at epoch 30.
         One run of one seed.
         laptop (16 trials, seed 0, two cores, about 9 minutes): val loss 0.322, val AUC 0.945 by the report's base setting,
         2 trials COMPLETE, 14 PRUNED; on a stand-in for CPN X-ray (395 images, not the published set) AUC 0.790
         [0.745, 0.834]. One run of one seed: it shows the way, not the winner.
"""

import sys

from medtune.recipes import MEDMAMBA, report_models, report_variations
from medtune.search.space import Choice, Milestones, Real, SearchSpace
from medtune.sweep import main

SPACE = SearchSpace(
    model=Choice(options=MEDMAMBA),
    optimizer=Choice(options=("adam", "adamw", "sgd")),
    lr=Real(low=1e-4, high=1e-2, log=True),
    milestones=Milestones(first=(0.1, 0.4), gap=(0.05, 0.3), count=(1, 3)),
    gamma=Real(low=1e-3, high=0.5, log=True),
    momentum=Real(low=0.0, high=0.99, only_if=("optimizer", "sgd")),
)

# The report's base setting, then the seven variations of its appendix.
BASE = next(settings for settings in report_models() if settings["model"] == "medmamba_s")
REPORT = (BASE, *report_variations())

if __name__ == "__main__":
    sys.exit(main("medmamba", SPACE, REPORT, description=__doc__ or ""))
