"""Where trials go, by what machines have and trials need: without Ray."""

import json
from types import SimpleNamespace

import pytest

from medtune.config import StudyConfig, TrialConfig
from medtune.errors import ConfigError
from medtune.needs import Needs
from medtune.placement import Machine, Place, Request, find, seats, share
from medtune.placer import PATIENCE, Placer
from medtune.reservation import Reservation
from medtune.search.conductor import Launch, Report
from medtune.waits import AFTER, ANY, Waits

GIB = 2**30
LARGE = Machine("a", "big", 16, 2, "H100", 80 * GIB)
SMALL = Machine("b", "desk", 8, 1, "2080 Ti", 11 * GIB)
PLAIN = Machine("c", "head", 4)
TRIAL = TrialConfig(pair="synthetic", model="medmamba_b")


def whole(cores=1, processes=1):
    return Request(processes, cores, lambda machine: 1.0 if machine.cards else None)


def parts(size):
    return Request(1, 1, lambda machine: size if machine.cards else None)


def fill(machines, request):
    """Places until there is none left."""
    taken = []
    while (place := find(machines, taken, request)) is not None:
        taken.append(place)
    return taken


def test_small_cards_first_and_each_card_once():
    taken = fill([LARGE, SMALL, PLAIN], whole())
    assert [place.host for place in taken] == ["desk", "big", "big"]
    assert [card for place in taken for card in place.on()] == [("b", 0), ("a", 0), ("a", 1)]
    assert seats([LARGE, SMALL, PLAIN], 1, 1.0) == 3


def test_cores_limit_what_a_machine_takes():
    assert len(fill([Machine("a", "big", 5, 4, "H100", 80 * GIB)], whole(cores=2))) == 2
    assert [p.part for p in fill([PLAIN], Request(1, 2, lambda machine: 0.0))] == [0.0, 0.0]


@pytest.mark.parametrize(("size", "count"), [(0.5, 2), (0.33, 3), (0.34, 2), (0.1, 10), (0.07, 14), (1.0, 1)])
def test_exactly_so_many_on_a_card(size, count):
    card = Machine("a", "big", 64, 1, "H100", 80 * GIB)
    taken = fill([card], parts(size))
    assert len(taken) == count and sum(place.part for place in taken) <= 1 + 1e-9
    assert find([card], taken[1:], parts(size)) == taken[0], "what one leaves the next one takes"


def test_parts_of_a_card_go_to_the_fullest_that_holds_them():
    pair = [Machine("a", "big", 64, 2, "H100", 80 * GIB)]
    taken = [Place(("a",), "big", "H100", 1, 0.6, (0,)), Place(("a",), "big", "H100", 1, 0.5, (1,))]
    assert find(pair, taken, parts(0.4)).cards == (0,)
    assert find(pair, taken, parts(0.45)).cards == (1,)
    assert find(pair, taken, parts(0.4), closed={("a", 0)}).cards == (1,)
    assert find(pair, taken, parts(0.6)) is None


def test_trials_spread_over_hosts():
    hosts = [Machine(name, name, 8, 4, "H100", 80 * GIB) for name in "ab"]
    assert [place.host for place in fill(hosts, whole())][:4] == ["a", "b", "a", "b"]


def test_processes_of_one_trial_are_on_one_kind():
    hosts = [SMALL, Machine("d", "desk2", 8, 1, "2080 Ti", 11 * GIB), LARGE]
    first = find(hosts, (), whole(processes=2))
    assert (first.kind, first.nodes, first.cards) == ("2080 Ti", ("b", "d"), (0, 0))
    second = find(hosts, [first], whole(processes=2))
    assert (second.kind, second.nodes, second.cards) == ("H100", ("a", "a"), (0, 1))
    assert find([SMALL, LARGE], (), whole(processes=3)) is None


def test_a_part_holds_the_need_with_a_margin():
    assert share(10 * GIB, 80 * GIB) == 0.14  # 13.1 %, in whole steps
    assert share(79 * GIB, 80 * GIB) == 1.0
    assert share(96 * GIB, 80 * GIB) > 1


def measured(gib, kind="H100", overhead=0.5):
    return {"kind": kind, "card": 80 * GIB, "reserved": (gib - overhead) * GIB, "overhead": overhead * GIB}


def test_needs_are_kept_by_what_decides_them_and_by_kind(tmp_path):
    needs = Needs(tmp_path)
    needs.note(TRIAL, measured(14))
    needs.note(TRIAL, measured(13))
    again = Needs(tmp_path)
    assert again.need(TRIAL.replace(lr=0.5, seed=7), "H100") == 14 * GIB
    assert again.overhead(TRIAL, "H100") == 0.5 * GIB
    assert again.need(TRIAL, "2080 Ti") is None and again.least(TRIAL, "2080 Ti") == 14 * GIB
    for other in ({"batch_size": 32}, {"optimizer": "sgd"}, {"activation_checkpointing": True}, {"image_size": 128}):
        assert again.need(TRIAL.replace(**other), "H100") is None
    assert Needs(tmp_path, processes=2).need(TRIAL, "H100") is None
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text())["model"] == "medmamba_b"
    path.write_text("{torn")
    assert Needs(tmp_path).need(TRIAL, "H100") is None


class Bench:
    """A study that is placed by hand; the clock too."""

    def __init__(self, folder, machines, gpus=1.0, to_come=0, **settings):
        self.live, self.waiting, self.left, self.now = {}, [], to_come, 0.0
        self.there = list(machines)
        self.needs = Needs(folder)
        self.placer = Placer(
            self, Reservation(1, 1, gpus), lambda: self.there, self.needs, clock=lambda: self.now, **settings
        )

    def to_come(self):
        return self.left

    def start(self, number, config=TRIAL, micro_batch=None):
        """As the conductor does: placed, or among the waiting."""
        self.placer.slots()
        place = self.placer.place(number, config)
        if place is None:
            self.waiting += [number] if number not in self.waiting else []
            return None
        self.waiting = [n for n in self.waiting if n != number]
        self.live[number] = Launch(number, 1, config, micro_batch, place)
        return place

    def hear(self, number, status="running", **more):
        """Whether the trial is to go on elsewhere."""
        return self.placer.moves(self.live[number], Report(number=number, attempt=1, status=status, **more))


def test_a_trial_known_not_to_fit_a_small_card_waits_for_a_large_one(tmp_path):
    bench = Bench(tmp_path, [SMALL, LARGE])
    bench.needs.note(TRIAL, measured(14))
    assert [bench.start(n).host for n in range(2)] == ["big", "big"]
    assert bench.start(2) is None
    assert bench.start(3, TRIAL.replace(model="medmamba_t")).host == "desk"
    del bench.live[0]
    assert bench.start(2).host == "big"


def test_out_of_memory_on_a_small_card_goes_on_whole_on_a_larger_one(tmp_path):
    bench = Bench(tmp_path, [SMALL, LARGE])
    assert bench.start(0).host == "desk"
    assert bench.hear(0, "out_of_memory", micro_batch=32)
    del bench.live[0]
    assert bench.start(0).host == "big" and bench.start(1).host == "big", "the next of its kind does not try"
    assert not bench.hear(0, "out_of_memory", micro_batch=32), "no card is larger: fewer images at once"


def test_out_of_memory_where_all_cards_are_alike_is_halved(tmp_path):
    bench = Bench(tmp_path, [SMALL])
    bench.start(0)
    assert not bench.hear(0, "out_of_memory", micro_batch=32)
    del bench.live[0]
    assert bench.start(0).host == "desk", "nothing larger was ever here: it does not wait for it"


def test_the_large_card_that_left_is_waited_for_and_then_done_without(tmp_path):
    bench = Bench(tmp_path, [SMALL, LARGE])
    bench.needs.note(TRIAL, measured(14))
    bench.placer.slots()
    bench.there = [SMALL]
    assert bench.start(0) is None
    bench.now = PATIENCE - 1
    assert bench.start(0) is None
    bench.now = PATIENCE
    assert bench.start(0).host == "desk"


def test_a_launch_whose_machine_went_is_taken_back(tmp_path):
    bench = Bench(tmp_path, [SMALL, LARGE])
    bench.start(0)
    bench.start(1)
    assert bench.placer.gone() == []
    bench.there = [LARGE]
    assert [launch.number for launch in bench.placer.gone()] == [0]


def test_the_first_of_its_kind_has_a_card_alone_and_then_its_part(tmp_path):
    bench = Bench(tmp_path, [LARGE], share=True, to_come=9)
    first = bench.start(0)
    assert first.part == 1.0 and first.measuring and bench.placer.cap(bench.live[0]) is None
    assert bench.hear(0, memory=measured(18)), "measured: it makes room"
    del bench.live[0]
    places = [bench.start(n) for n in range(9)]
    assert [place and place.part for place in places] == [0.24] * 8 + [None]
    assert sorted(place.cards for place in places[:8]) == [(0,)] * 4 + [(1,)] * 4
    # What torch may take, and what CUDA takes beside it, is the part: never beyond.
    assert bench.placer.cap(bench.live[0]) == pytest.approx(0.24 - 0.5 / 80)


def test_measured_but_nobody_to_share_with_it_stays(tmp_path):
    bench = Bench(tmp_path, [LARGE], share=True, to_come=0)
    bench.start(0)
    assert not bench.hear(0, memory=measured(18))


def test_a_part_that_was_too_little_grows_before_anything_is_halved(tmp_path):
    bench = Bench(tmp_path, [LARGE], share=True, to_come=9)
    bench.needs.note(TRIAL, measured(40))
    assert bench.start(0).part == 0.53
    for part in (0.66, 0.83, 1.0):
        assert bench.hear(0, "out_of_memory", micro_batch=32)
        del bench.live[0]
        assert bench.start(0).part == part
    assert not bench.hear(0, "out_of_memory", micro_batch=32)


def test_a_card_is_emptied_for_a_trial_that_needs_it_whole(tmp_path):
    card = Machine("a", "big", 64, 1, "H100", 80 * GIB)
    bench = Bench(tmp_path, [card], share=True, to_come=9)
    small = TRIAL.replace(model="medmamba_t")
    bench.needs.note(small, measured(20))
    bench.start(0, small)
    assert bench.start(1, TRIAL) is None
    assert bench.start(2, small) is None, "else the first would wait for ever"
    del bench.live[0]
    assert bench.start(2, small) is None and bench.start(1, TRIAL).part == 1.0


def test_memory_of_a_card_with_neighbours_is_not_taken_for_a_need(tmp_path):
    bench = Bench(tmp_path, [LARGE], gpus=0.5)
    bench.start(0)
    assert not bench.hear(0, "out_of_memory", micro_batch=32) and bench.needs.too_small(TRIAL) == 0


def test_slots_count_what_is_there(tmp_path):
    bench = Bench(tmp_path, [SMALL, LARGE, PLAIN])
    assert bench.placer.slots() == 3
    bench.there.remove(LARGE)
    assert bench.placer.slots() == 1
    assert Bench(tmp_path, [SMALL, LARGE], gpus=0.0).placer.slots() == 24
    assert Bench(tmp_path, [SMALL, LARGE], gpus=0.25, most=5).placer.slots() == 5


def told(waits, waiting, *times):
    return [waits.tell(waiting, now) for now in times]


def test_what_no_machine_can_hold_is_named_within_a_minute_and_once(tmp_path):
    bench = Bench(tmp_path, [SMALL])
    bench.needs.note(TRIAL, measured(14.2))
    waits = Waits(bench.placer)
    said = told(waits, {7: TRIAL}, 0, AFTER, AFTER + 20)
    assert AFTER <= 60 and said[0] == [] == said[2]
    (line,) = said[1]
    assert line.startswith("waiting: trial 7 (medmamba_b) for a GPU with 14.2 GiB: the largest here has 11.0 GiB (2080 Ti")
    assert "--activation-checkpointing" in line and "--batch-size" in line
    bench.there = [PLAIN]
    (line,) = told(waits, {7: TRIAL}, 100, 200)[1]
    assert "trial 7 (medmamba_b) for a GPU: no machine here has one now" in line, "said again when it changes"
    assert told(waits, {ANY: TRIAL}, 300, 400)[1][0].startswith("waiting: the trials to come for a GPU")


def test_waiting_while_others_compute_is_no_alarm(tmp_path):
    bench = Bench(tmp_path, [SMALL])
    bench.start(0)
    assert bench.start(1) is None
    assert told(Waits(bench.placer), {1: TRIAL}, 0, 100) == [[], []]


def test_what_left_and_came_back_is_no_alarm(tmp_path):
    bench = Bench(tmp_path, [PLAIN])
    waits = Waits(bench.placer)
    waits.tell({0: TRIAL}, 0)
    bench.there = [SMALL]
    waits.tell({0: TRIAL}, 20)
    bench.there = [PLAIN]
    assert told(waits, {0: TRIAL}, 40, 60) == [[], []]


def test_a_request_of_more_cores_than_any_machine_has_is_named(tmp_path):
    bench = Bench(tmp_path, [PLAIN], gpus=0.0)
    bench.placer.reservation = Reservation(2, 3, 0.0)
    (line,) = told(Waits(bench.placer), {0: TRIAL}, 0, AFTER)[1]
    assert "machines of one kind with 2 places, each with 3 CPU cores" in line


def test_a_cluster_that_grows_is_said_to_be_asked(tmp_path):
    bench = Bench(tmp_path, [PLAIN], limit=4)
    (line,) = told(Waits(bench.placer), {0: TRIAL}, 0, AFTER)[1]
    assert line.endswith("The cluster has been asked for more machines.")


def test_sharing_excludes_a_fixed_part():
    with pytest.raises(ConfigError, match="share_gpus must be off where gpus_per_trial says"):
        StudyConfig(share_gpus=True, gpus_per_trial=0.5)
    with pytest.raises(ConfigError, match="share_gpus must be off where several processes"):
        StudyConfig(share_gpus=True, processes_per_trial=2)


def test_equal_places_make_equal_requests():
    from medtune.reservation import request

    place = Place(("ab12",), "big", "H100", 1, 0.25, (0,))
    other = Place(("ab12",), "big", "H100", 1, 0.25, (1,))
    assert request(place) == request(other) and hash(request(place)) == hash(request(other))
    assert request(place) != request(Place(("cd34",), "big", "H100", 1, 0.25, (0,)))
    several = request(Place(("ab12", "cd34"), "big", "H100", 2, 1.0, (0, 0)))
    assert several.head_bundle_is_empty and several.bundles == [{"CPU": 2.0, "GPU": 1.0}] * 2


def test_the_watch_asks_for_what_is_missing_and_no_more(tmp_path):
    from medtune.watch import Watch

    bench = Bench(tmp_path, [PLAIN], to_come=9, limit=4)
    watch = Watch(bench, bench.placer, SimpleNamespace(), None, print)
    assert watch.wanted() == 4
    bench.there = [PLAIN, LARGE]
    assert watch.wanted() == 2
    bench.left = 1
    assert watch.wanted() == 1
    bench.placer.most = 0
    assert watch.wanted() == 0
