"""`medtune wandb`: a study's W&B workspace as code. Its panels are made or brought back to what stands here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from medtune.errors import StudyError
from medtune.record import read_json, write_json
from medtune.results import Study
from medtune.wandb_env import Account, TrackingError, app_url, ask, base_url, check, find_account, how_to_log_in
from medtune.wandb_files import run_files

FILE = "workspace.json"
_VIEWER = "query Viewer { viewer { entity } }"


def save_workspace(study: Study) -> str:
    """Make the study's workspace, or update the one that was made before; returns its address.

    Raises StudyError without runs, TrackingError without a key or with a server that does not take it.
    """
    account = find_account()
    if account is None:
        raise TrackingError(f"no W&B key for {base_url()}. {how_to_log_in()} Then `medtune wandb {study.where}`.")
    files = run_files(study.folder)
    if not files:
        raise StudyError(f"no W&B runs in {study.where}/wandb: it was run with --wandb off, or has no trials yet")
    check(account)
    project = files[0].project
    entity = os.environ.get("WANDB_ENTITY") or (ask(account, _VIEWER).get("viewer") or {}).get("entity")
    if not entity:
        raise TrackingError(f"{account.url} does not say whose workspaces the key opens: set WANDB_ENTITY")
    return _save(account, study, entity, project)


def _save(account: Account, study: Study, entity: str, project: str) -> str:
    os.environ.update(account.environment | {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"})
    # Late: wandb reads its environment when it is imported, and takes seconds.
    from wandb_workspaces.workspaces import RunsetSettings, Workspace, WorkspaceSettings
    from wandb_workspaces.workspaces.internal import get_view_dict

    workspace = Workspace(
        entity=entity,
        project=project,
        name=f"medtune {study.name}",
        sections=sections(study),
        settings=WorkspaceSettings(x_axis="epoch", max_runs=100),
        runset_settings=RunsetSettings(filters=f"Metric('Group') = '{study.record['id']}'"),
    )
    place = {"server": account.url, "entity": entity, "project": project}
    known = _known(study.folder, place)
    try:
        if known and _is_there(get_view_dict, entity, project, known["name"]):
            workspace._internal_name, workspace._internal_id = known["name"], known["id"]
        workspace.save()
    except Exception as error:  # whatever wandb makes of what the server says
        raise TrackingError(f"{account.url} does not take the workspace: {type(error).__name__}: {error}") from None
    name, number = workspace._internal_name, workspace._internal_id
    write_json(study.folder / "wandb" / FILE, place | {"name": name, "id": number})
    return f"{app_url(account.url)}/{entity}/{project}?nw={name.removeprefix('nw-').removesuffix('-v')}"


def _known(folder: Path, place: dict[str, str]) -> dict[str, Any] | None:
    found = read_json(folder / "wandb" / FILE)
    return found if found and place.items() <= found.items() else None


def _is_there(get_view: Any, entity: str, project: str, name: str) -> bool:
    """Whether the view that was made before was not deleted since."""
    try:
        get_view(entity, project, name.removeprefix("nw-").removesuffix("-v"))
    except ValueError:
        return False
    return True


def sections(study: Study) -> list[Any]:
    """The workspace's sections, the search first."""
    from wandb_workspaces.workspaces import Section

    panels = {"search": _search(study), "val and external": _figures(study)}
    panels |= {"learning": _learning(), "machines": _machines()}
    return [Section(name=name, panels=found, is_open=True) for name, found in panels.items()]


def _search(study: Study) -> list[Any]:
    from wandb_workspaces.reports import v2 as wr

    best = f"best/{study.selection}"
    names = study.record.get("parameters") or study.record["space"]
    columns = [
        wr.ParallelCoordinatesPlotColumn(wr.Config(name), log=_is_log(study, name) or None)
        for name in (*names, *([] if "model" in names else ["model"]))
    ]
    outcomes = [wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric(name)) for name in (best, "external/auc")]
    return [
        wr.ParallelCoordinatesPlot(title="settings and outcome", columns=[*columns, *outcomes]),
        wr.ParameterImportancePlot(with_respect_to=best),
    ]


def _is_log(study: Study, name: str) -> bool:
    words = (study.record.get("parameters") or {}).get(name, {})
    return str(words.get("distribution", "")).startswith("log")


def _figures(study: Study) -> list[Any]:
    from wandb_workspaces.reports import v2 as wr

    by_model = [
        wr.BarPlot(title=f"{name} by model", metrics=[name], groupby=wr.Config("model"), groupby_rangefunc="minmax")
        for name in ("best/val/auc", f"best/{study.selection}", "external/auc", "external_matched/auc", "external/oa")
    ]
    against = wr.ScatterPlot(
        title="external AUC against val AUC",
        x=wr.SummaryMetric("best/val/auc"),
        y=wr.SummaryMetric("external/auc"),
        regression=True,
    )
    return [against, *by_model]


def _learning() -> list[Any]:
    from wandb_workspaces.reports import v2 as wr

    names = ("train/loss", "val/loss", "val/auc", "val/oa", "val/sensitivity", "val/specificity", "external/auc", "lr")
    return [wr.LinePlot(title=name, x="epoch", y=[name], max_runs_to_show=100) for name in names]


def _machines() -> list[Any]:
    from wandb_workspaces.reports import v2 as wr

    titles = {"gpu": "GPU use, %", "memoryAllocated": "GPU memory, %", "powerPercent": "GPU power, %"}
    panels = [
        wr.LinePlot(title=title, x="RelativeTime(Process)", metric_regex=rf"^system[./]gpu\.[0-9]+\.{name}$")
        for name, title in titles.items()
    ]
    return [*panels, wr.LinePlot(title="images a second", x="epoch", y=["images_per_second"])]
