"""Data pairs: a set to train on and an external set to be tested on, as uint8 arrays in memory.

Light to import: torch is first needed by `medtune.data.transforms`.
"""

from medtune.data.folders import data_folder, external_folder
from medtune.data.pair import PairData, Split, limit
from medtune.data.registry import available_pairs, load_pair

__all__ = ["PairData", "Split", "available_pairs", "data_folder", "external_folder", "limit", "load_pair"]
