"""A trial that several processes train together, each in its own part of the trial's reservation.

The trial's own actor only conducts: it computes nothing, so a process that dies or runs out of memory while the others
wait for it can always be answered, by ending the others. The processes are kept for the next trial as long as they are
well. The first one (rank 0) writes, tests and reports as a trial's one process does; the others follow it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import socket
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from medtune.config import TrialConfig
from medtune.errors import MachineFault
from medtune.evaluate import default_device
from medtune.lifeline import Lifeline
from medtune.memory import OutOfMemory
from medtune.parallel import Group, joined
from medtune.record import LocalRecord
from medtune.search.conductor import Report, attempt_folder
from medtune.storage.attempt import Workplace, workplace
from medtune.trial import (
    Attempt,
    AttemptSpec,
    Begun,
    begin_fit,
    begin_watch,
    failed,
    memory_returned,
    note_out_of_memory,
    remember,
    to_config,
)

SAME_END = 5.0
"""Seconds in which processes that fail for the same reason all say so."""


class Follower:
    """A process other than the first: trains its part, and writes nothing."""

    def __init__(self, spec: AttemptSpec, group: Group) -> None:
        self.spec = spec
        self.group = group
        self.begun: Begun | None = None

    def next_report(self) -> Report:
        """Train one more epoch; only the status counts."""
        report = functools.partial(Report, number=self.spec.number, attempt=self.spec.attempt)
        try:
            if self.begun is None:
                self.begun = begin_fit(self.spec, TrialConfig.from_dict(self.spec.config), self.group)
            next(self.begun.fit, None)
        except MachineFault:
            raise
        except OutOfMemory as error:
            if error.fits is None or self.begun is None:
                return failed(report(status="fail"), error)
            remember(self.begun, error.fits)
            return report(status="out_of_memory", micro_batch=error.fits, cause=str(error))
        except Exception as error:
            return failed(report(status="fail"), error)
        return report(status="running", epoch=self.begun.fit.epoch)

    def close(self) -> None:
        """Let go of everything."""
        if self.begun is not None:
            self.begun.fit.close()
            self.begun = None


class Member:
    """One of the processes, as an actor."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._attempt: Attempt | Follower | None = None
        self._lifeline: Lifeline | None = None
        self._place: Workplace

    def node(self) -> str:
        """The machine this process is on."""
        return str(ray.get_runtime_context().get_node_id())

    def port(self) -> str:
        """A free port of this machine, for a group on several to meet at."""
        with socket.socket() as free:
            free.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"

    def begin(self, spec: str, group: Group, address: str, local: bool) -> None:
        """Join the group for an attempt."""
        self._stack.enter_context(joined(group, address, default_device(), local=local))
        self._place = workplace(AttemptSpec(**json.loads(spec)))
        about = self._place.begin()
        self._attempt = Attempt(about, group) if group.leads else Follower(about, group)
        leader = self._attempt if isinstance(self._attempt, Attempt) else None
        self._lifeline = begin_watch(about, self._lifeline, leader)

    def next_report(self) -> str:
        """One more epoch, as JSON."""
        assert self._attempt is not None
        report = self._attempt.next_report()
        if isinstance(self._attempt, Attempt):  # a follower writes nothing
            self._place.before_report(report.leaving)
        return json.dumps(report.to_dict())

    def end(self) -> None:
        """Leave the group. Raises MachineFault when this process cannot take another trial."""
        if self._attempt is not None:
            self._place.before_close()
            self._attempt.close()
            self._place.end()
        self._attempt = None
        self._stack.close()
        if not memory_returned():
            raise MachineFault("the last trial left device memory behind")


class Team:
    """The processes, started when first needed and kept from trial to trial."""

    def __init__(self, processes: int, threads: int, member: type[Member] = Member) -> None:
        self.processes = processes
        self.threads = threads
        self.member = member
        self.members: list[Any] = []
        self.meeting: Path | None = None
        """Folder of the file where a group on this machine alone meets."""

    def begin(self, spec: AttemptSpec) -> None:
        """Start what is not running and have all join for an attempt. Raises MachineFault when that fails."""
        if not self.members:
            self.members = [self._start(rank) for rank in range(self.processes)]
        try:
            here = ray.get_runtime_context().get_node_id()
            local = set(ray.get([member.node.remote() for member in self.members])) == {here}
            if local:
                self.meeting = Path(tempfile.mkdtemp(prefix="medtune-group-"))
                address = (self.meeting / "store").as_uri()
            else:
                address = ray.get(self.members[0].port.remote())
            text = to_config(spec)["spec"]
            groups = [Group(rank, self.processes) for rank in range(self.processes)]
            ray.get([m.begin.remote(text, g, address, local) for m, g in zip(self.members, groups, strict=True)])
        except RayError as error:
            self.stop()
            raise MachineFault(f"the trial's {self.processes} processes did not come together: {_last(error)}") from None

    def _start(self, rank: int) -> Any:
        place: PlacementGroup | None = ray.util.get_current_placement_group()
        options: dict[str, Any] = {"num_cpus": self.threads}
        if place is not None:
            # One bundle each: the trial's own actor needs none (medtune.reservation).
            bundle = place.bundle_specs[rank]
            options = {"num_cpus": bundle.get("CPU", 0), "num_gpus": bundle.get("GPU", 0)}
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(place, rank)
        return ray.remote(self.member).options(**options).remote()

    def next_report(self) -> Report:
        """One more epoch by all: the first process's report, or that of one that failed alone.

        Raises MachineFault when a process died. After either the others are ended, as they may wait for it for ever.
        """
        waiting = {member.next_report.remote(): rank for rank, member in enumerate(self.members)}
        reports: dict[int, Report] = {}
        deadline: float | None = None
        while waiting:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            done, _ = ray.wait(list(waiting), num_returns=1, timeout=left)
            if not done:
                break
            rank = waiting.pop(done[0])
            try:
                reports[rank] = Report(**json.loads(ray.get(done[0])))
            except RayError as error:
                self.stop()
                raise MachineFault(f"process {rank} of {self.processes} ended: {_last(error)}") from None
            if reports[rank].status == "out_of_memory":
                self.stop()
                return reports[rank]
            if reports[rank].status == "fail" and deadline is None:
                deadline = time.monotonic() + SAME_END
        failed = [reports[rank] for rank in sorted(reports) if reports[rank].status == "fail"]
        if not failed:
            return reports[0]
        if len(failed) < self.processes:
            self.stop()
        return failed[0]

    def end(self) -> None:
        """Leave the attempt; processes that cannot are ended."""
        if self.members:
            try:
                ray.get([member.end.remote() for member in self.members], timeout=60)
            except RayError:
                self.stop()
        self._leave()

    def stop(self) -> None:
        """End all processes at once."""
        for member in self.members:
            ray.kill(member)
        self.members = []
        self._leave()

    def _leave(self) -> None:
        if self.meeting is not None:
            shutil.rmtree(self.meeting, ignore_errors=True)
            self.meeting = None


class TeamAttempt:
    """One attempt at a trial by a team; the same as `Attempt` to its caller."""

    def __init__(self, spec: AttemptSpec, team: Team) -> None:
        self.spec = spec
        self.team = team
        self.begun = False
        self.started = time.perf_counter()

    def next_report(self) -> Report:
        """One more epoch by all."""
        if not self.begun:
            self.team.begin(self.spec)
            self.begun = True
        report = self.team.next_report()
        # Of the whole attempt: a process that failed alone knows neither.
        report = replace(report, node=report.node or socket.gethostname(), seconds=time.perf_counter() - self.started)
        record = LocalRecord(attempt_folder(self.spec.trials, self.spec.number, self.spec.attempt))
        if report.status == "fail":
            record.final(report.to_dict())
        elif report.status == "out_of_memory":
            note_out_of_memory(record, report)
        return report

    def close(self) -> None:
        """Let go of the attempt."""
        self.team.end()


def _last(error: RayError) -> str:
    """The reason out of Ray's report of many lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__
