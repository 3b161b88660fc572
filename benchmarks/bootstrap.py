"""How fast are the bootstrap intervals of the external test?

Run:     python benchmarks/bootstrap.py [IMAGES] [RESAMPLES]        (default: the CPN X-ray set's 3602, and 1000)
Result:  see the last line; the loop over scikit-learn's functions is timed on 20 resamples and scaled up
"""

from __future__ import annotations

import os
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from sklearn.metrics import accuracy_score, f1_score, recall_score, roc_auc_score

from medtune import metrics

LOOP = 20


def main(images: int = 3602, resamples: int = 1000) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(images) % 2
    logits = rng.normal(size=(images, 2))
    logits[:, 1] += 2 * labels
    probs = metrics.softmax(logits)

    started = time.perf_counter()
    bounds = metrics.intervals(probs, labels, resamples)
    ours = time.perf_counter() - started

    started = time.perf_counter()
    for drawn in metrics.resample_indices(labels, LOOP, seed=0):
        truth, scores = labels[drawn], probs[drawn, 1]
        decided = probs[drawn].argmax(axis=1)
        accuracy_score(truth, decided)
        recall_score(truth, decided)
        recall_score(truth, decided, pos_label=0)
        f1_score(truth, decided)
        roc_auc_score(truth, scores)
    loop = (time.perf_counter() - started) * resamples / LOOP

    for name, pair in bounds.items():
        print(f"{name:12} {metrics.classification(probs, labels)[name]:.4f}  95 % {pair}")
    print(f"{images} images x {resamples} resamples, 1 core: ours {ours:.2f} s, scikit-learn's loop {loop:.1f} s")


if __name__ == "__main__":
    main(*(int(value) for value in sys.argv[1:]))
