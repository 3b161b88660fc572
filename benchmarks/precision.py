"""Whether bf16 learns what float32 learns: val curves of both over several seeds, their difference beside the seeds' spread.

Run:  python -m benchmarks.precision [--trial.model medmamba_s] [--trial.epochs 6] [--seeds 3] [--data-dir DIR ...]
      (on a CPU: --trial.image-size 32 --trial.train-limit 256 --trial.epochs 2 --trial.model medmamba_t)

The same seeds, so the same initial weights, images and draws in both; a seed's spread is the standard deviation over seeds.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import tyro

from benchmarks.gpu import describe
from medtune.config import Precision, TrialConfig
from medtune.data import limit, load_pair
from medtune.evaluate import default_device
from medtune.training import fit

FIGURES = ("val/loss", "val/auc")
DEFAULT = TrialConfig(model="medmamba_s", image_size=224, batch_size=64, epochs=6, lr=1e-4, resamples=0)


def main(
    trial: TrialConfig = DEFAULT,
    seeds: int = 3,
    data_dir: Path | None = None,
    external_dir: Path | None = None,
) -> None:
    """Train and print the curves.

    Args:
        trial: what is trained; its precision and seed are not looked at.
        seeds: trainings of each precision.
        data_dir: see --data-dir of a sweep.
        external_dir: see --external-dir of a sweep.
    """
    device = default_device()
    print(f"{trial.model}, {trial.image_size} px, batch {trial.batch_size}; {describe(device)}", flush=True)
    data = load_pair(trial.pair, native_size=trial.native_size, data_dir=data_dir, external_dir=external_dir)
    data = limit(data, train_limit=trial.train_limit, external_limit=trial.external_limit)
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    curves = {precision: np.zeros((seeds, trial.epochs, len(FIGURES))) for precision in precisions}
    for precision, seed in itertools.product(precisions, range(seeds)):
        run = fit(trial.replace(precision=precision, seed=seed), data, device=device)
        results = list(run)
        run.close()
        curves[precision][seed] = [[result.metrics[name] for name in FIGURES] for result in results]
        print(f"{precision} seed {seed}: {results[-1].images_per_second:.0f} images/s", flush=True)
    means = {precision: values.mean(0) for precision, values in curves.items()}
    spread = curves["fp32"].std(0, ddof=1) if seeds > 1 else np.full_like(means["fp32"], np.nan)
    for i, name in enumerate(FIGURES):
        print(f"\n{name:>10}{'fp32':>10}{'bf16':>10}{'difference':>12}{'spread of seeds in fp32':>26}")
        for epoch in range(trial.epochs):
            a, b = means["fp32"][epoch, i], means["bf16"][epoch, i]
            print(f"{'epoch ' + str(epoch + 1):>10}{a:>10.4f}{b:>10.4f}{b - a:>12.4f}{spread[epoch, i]:>26.4f}")
        away = np.abs(means["bf16"] - means["fp32"])[:, i]
        print(f"mean difference {away.mean():.4f}, mean spread {spread[:, i].mean():.4f}", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
