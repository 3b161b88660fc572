"""Train on PneumoniaMNIST, test on the CPN X-ray set or on a folder in its layout."""

from medtune.data import cpn
from medtune.data.external_pair import ExternalPair

PAIR = ExternalPair("pneumoniamnist-cpn", "pneumoniamnist", cpn.SET)
load, get, check, where = PAIR.load, PAIR.get, PAIR.check, PAIR.where
