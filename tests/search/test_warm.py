"""Which processes are kept for the next trial."""

from medtune.search.warm import WarmProcesses


def test_a_process_is_kept_for_the_trial_that_follows_whoever_else_is_being_started():
    cache = WarmProcesses()
    cache.increase_max("other machine")
    assert cache.cache_object("here", 1)
    assert list(cache.flush_cached_objects()) == []
    assert cache.pop_cached_object("here") == 1
    assert list(cache.flush_cached_objects()) == [] and cache.num_cached_objects == 0


def test_nobody_came_for_it():
    cache = WarmProcesses()
    cache.increase_max("other machine")
    cache.cache_object("here", 1)
    assert [list(cache.flush_cached_objects()) for _ in range(2)] == [[], [1]]
    assert cache.num_cached_objects == 0 and not cache.has_cached_object("here")


def test_one_that_a_trial_waits_for_stays_and_the_last_one_too():
    cache = WarmProcesses()
    cache.increase_max("here")
    cache.cache_object("here", 1)
    cache.cache_object("here", 2)
    assert [list(cache.flush_cached_objects()) for _ in range(3)] == [[], [1], []]
    cache.decrease_max("here")
    assert list(cache.flush_cached_objects()) == [] and cache.has_cached_object("here")
    assert list(cache.flush_cached_objects(force_all=True)) == [2]
