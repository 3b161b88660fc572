"""Train on BreastMNIST, test on Breast Ultrasound Images or on a folder in its layout; malignant is positive.

The report's future work names the pair, but the test is no external one: BreastMNIST is made from these 780 images. So
each pair that loads says so. Another hospital's images, in folders normal, benign and malignant, make it one.
"""

from medtune.data import busi
from medtune.data.external_pair import ExternalPair

PAIR = ExternalPair(
    "breastmnist-busi",
    "breastmnist",
    busi.SET,
    note="NOT AN EXTERNAL TEST ON BUSI: BreastMNIST, its training images included, is made from the 780 images of Breast "
    "Ultrasound Images. Figures on BUSI are of images that were trained on, not of another hospital's: they say how well "
    "a model remembers. A folder of another hospital's images (--external-dir) is an external test, one of BUSI's is not",
)
load, get, check, where = PAIR.load, PAIR.get, PAIR.check, PAIR.where
