"""What a trial leaves behind while it runs: the local record, always, and a W&B run written offline.

W&B never decides a trial's fate: its run is written to files beside the study without touching the network, and an
exception of its code turns it off for the attempt. `medtune.wandb_sync` uploads the files, beside the study or later.
"""

from medtune.record import LocalRecord, earlier_epochs, read_epochs, read_events, read_final, read_outcome
from medtune.wandb_run import WandbRun, run_id

__all__ = [
    "LocalRecord",
    "WandbRun",
    "earlier_epochs",
    "read_epochs",
    "read_events",
    "read_final",
    "read_outcome",
    "run_id",
]
