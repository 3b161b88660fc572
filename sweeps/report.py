"""The report again: its seven models and the seven variations of its appendix, each from several seeds.

Run:     python sweeps/report.py                                 (as the report says: 70 trainings; needs GPUs)
         python sweeps/report.py --as-run                        (as its scripts ran: the learning rate never drops)
         python sweeps/report.py --preset laptop --seeds 1       (32 px, and the preset's epochs and batch for all)
         python sweeps/report.py --model medmamba_s --name s     (that model's settings alone, a study of its own)
Result:  full: not run yet.
         laptop (5 seeds, 70 trainings, `--gpus-per-trial 0.125`: 3 min 39 s on one H100, commit 2c74697), AUC on a stand-in
         for CPN X-ray (395 images, not the published set), mean and range over seeds: MedMamba-t 0.801 [0.769, 0.823],
         s 0.798 [0.760, 0.838], b 0.783 [0.758, 0.815]; MedViT-small 0.784 [0.771, 0.807], large 0.565 [0.485, 0.694];
         ResNet50 0.788 [0.764, 0.816]. It shows the way: 32 px, 5 epochs, 512 images.

Nothing is searched and nothing stopped early. `--seeds 8` after `--seeds 5` adds three trainings of each setting.
"""

import sys
from dataclasses import dataclass

from medtune.recipes import SELECTION, report_settings
from medtune.search.plan import Settings
from medtune.sweep import PlanFlags, main_planned


@dataclass(frozen=True, kw_only=True)
class Flags(PlanFlags):
    """The script's own flags."""

    as_run: bool = False
    """As the report's scripts ran, not as it says: a constant learning rate; ResNet50 with batch 64 and 150 epochs."""


def planned(flags: Flags) -> tuple[str, tuple[Settings, ...]]:
    """The study's name and settings."""
    return ("report-as-run" if flags.as_run else "report"), report_settings(flags.as_run)


if __name__ == "__main__":
    sys.exit(main_planned(planned, Flags(), description=__doc__ or "", defaults={"selection": SELECTION}))
