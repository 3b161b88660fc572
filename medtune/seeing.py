"""`medtune dashboard` and `medtune wandb`: the commands that show a study elsewhere."""

from __future__ import annotations

import contextlib

import tyro


def dashboard(study: tyro.conf.Positional[str], *, port: int = 8080, storage: str | None = None) -> None:
    """Show a study in Optuna's dashboard, on this machine, until Ctrl-C: live, and without a way to change it.

    Args:
        study: The study's name, or its folder.
        port: Port on 127.0.0.1; 0: any that is free.
        storage: Folder, s3://... or gs://... that holds studies; default: $MEDTUNE_STORAGE, then a user folder.
    """
    from medtune.dashboard import listen
    from medtune.results import SYNTHETIC, load_study

    found = load_study(study, storage)
    with listen(found, port) as server:
        where = f" in {found.where}" if found.bucket else ""
        print(f"study {found.name}{where}: http://{server.server_name}:{server.server_port}/  Ctrl-C ends this", flush=True)
        if found.record["synthetic"]:
            print(SYNTHETIC)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


def wandb(study: tyro.conf.Positional[str], *, storage: str | None = None) -> None:
    """Make or update a W&B workspace for a study's runs, and print its address.

    Args:
        study: The study's name, or its folder.
        storage: Folder, s3://... or gs://... that holds studies; default: $MEDTUNE_STORAGE, then a user folder.
    """
    from medtune.results import load_study
    from medtune.storage.home import wandb_files_here
    from medtune.wandb_workspace import save_workspace

    found = load_study(study, storage)
    with wandb_files_here(found.bucket, found.folder):
        address = save_workspace(found)
    print(f"workspace of study {found.name}: {address}")
