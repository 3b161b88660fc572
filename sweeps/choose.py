"""Choose with evidence in a study on a cluster: `medtune choose` as a script, which is what `ray submit` takes.

Run:     ray submit cluster.yaml sweeps/choose.py -- medmamba-full --top 3 --seeds 5
Result:  a choice.json in the study; on a machine that is part of the cluster `medtune choose STUDY` is the same.
"""

import sys

from medtune.cli import main

if __name__ == "__main__":
    sys.exit(main(["choose", *sys.argv[1:]]))
