"""What a study took of the machines, added up over launches."""

import json

import pytest

from medtune.placement import Machine, Place
from medtune.usage import Usage, lines, read_usage

BIG = Machine("a", "big", 16, 2, "H100", 80 * 2**30)
DESK = Machine("b", "desk", 8, 1, "2080 Ti", 11 * 2**30)


def on(machine, part=1.0, card=0, cores=1):
    return Place((machine.id,), machine.host, machine.kind, cores, part, (card,) if part else ())


def test_idle_share_hours_by_model_and_trials_by_gpu(tmp_path):
    usage = Usage(tmp_path, gpus=True)
    usage.count(1800, [BIG, DESK], [(0, "vim", on(BIG)), (1, "vmamba", on(BIG, card=1))])
    usage.count(1800, [BIG, DESK], [(2, "vim", on(DESK))])
    usage.save()
    found = read_usage(tmp_path)["gpu"]
    assert found["hours_there"] == 3 and found["idle_share"] == pytest.approx(0.5)
    assert found["hours_by_model"] == {"vim": 1.0, "vmamba": 0.5}
    assert [(m["host"], m["kind"], m["trials"], m["idle_share"]) for m in found["machines"]] == [
        ("big", "H100", 2, 0.5), ("desk", "2080 Ti", 1, 0.5)
    ]  # fmt: skip
    said = lines(read_usage(tmp_path))
    assert said[0] == "GPU-hours: 3 there, 50% idle; by model: vim 1, vmamba 0.5"
    assert said[1] == "  big (2 x H100): 2 trials, 1.0 per GPU, 50% idle"


def test_a_shared_card_is_busy_once_and_its_hours_are_divided(tmp_path):
    usage = Usage(tmp_path, gpus=True)
    usage.count(3600, [DESK], [(n, "vim", on(DESK, part=0.25)) for n in range(3)])
    usage.save()
    found = read_usage(tmp_path)["gpu"]
    assert found["idle_share"] == 0 and found["hours_by_model"] == {"vim": 0.75}


def test_launches_add_up_and_a_trial_counts_once(tmp_path):
    for _ in range(2):
        usage = Usage(tmp_path, gpus=True)
        usage.count(60, [Machine("new-id", "desk", 8, 1, "2080 Ti")], [(0, "vim", on(Machine("new-id", "desk", 8, 1)))])
        usage.save()
    found = read_usage(tmp_path)["gpu"]
    assert found["launches"] == 2 and found["hours"] == pytest.approx(120 / 3600)
    assert [machine["trials"] for machine in found["machines"]] == [1]


def test_without_gpus_the_same_is_told_of_cores(tmp_path):
    usage = Usage(tmp_path, gpus=False)
    usage.count(3600, [Machine("a", "pc", 4)], [(0, "vim", on(Machine("a", "pc", 4), part=0, cores=2))])
    usage.save()
    assert lines(read_usage(tmp_path)) == [
        "core-hours: 4 there, 50% idle; by model: vim 2",
        "  pc (4 cores): 1 trial, 50% idle",
    ]


def test_a_trial_of_several_processes_takes_all_its_cards(tmp_path):
    usage = Usage(tmp_path, gpus=True)
    usage.count(3600, [BIG], [(0, "vim", Place(("a", "a"), "big", "H100", 1, 1.0, (0, 1)))])
    usage.save()
    found = read_usage(tmp_path)["gpu"]
    assert found["idle_share"] == 0 and found["hours_by_model"] == {"vim": 2.0}


def test_nothing_counted_says_nothing(tmp_path):
    assert lines(read_usage(tmp_path)) == []
    (tmp_path / "usage.json").write_text(json.dumps({}))
    assert lines(read_usage(tmp_path)) == []
