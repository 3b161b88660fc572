"""Breast Ultrasound Images (Al-Dhabyani et al. 2020, doi.org/10.1016/j.dib.2019.104863): PNG of about 500x500.

Masks of the lesions lie beside the images. Normal and benign are one class, as in BreastMNIST; malignant is positive.
"""

from __future__ import annotations

from medtune.data.archive import Published
from medtune.data.image_folder import Layout

SET = Published(
    key="busi",
    called="busi (which BreastMNIST is made from)",
    title="Breast Ultrasound Images",
    files=("Dataset_BUSI.zip",),
    counts={"benign": 437, "malignant": 210, "normal": 133},
    layout=Layout({"normal": 0, "benign": 0, "malignant": 1}, side=256, ignored=r"_mask(_\d+)?\."),
    page="https://scholar.cu.edu.eg/?q=afahmy/pages/dataset",
    urls=("https://scholar.cu.edu.eg/Dataset_BUSI.zip",),
    pair="breastmnist-busi",
)
