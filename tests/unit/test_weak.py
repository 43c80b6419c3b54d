"""Weak containers: what they keep, what they forget, and that no Ctrl-C is lost in them."""

import _thread
import functools
import gc
import operator
import signal
import threading
import weakref
from dataclasses import dataclass

import pytest

from commlib.weak import WeakMap, WeakSet


class Thing:
    pass


@dataclass
class Equal:
    """One that equals every other, and has no hash."""


def test_a_map_keeps_values_as_long_as_their_objects_are_there():
    one, other = Thing(), Thing()
    known = WeakMap()
    known[one], known[other] = "one", "other"
    known[one] = "again"
    assert [(thing, known[thing]) for thing in known] == [(one, "again"), (other, "other")]
    assert known.setdefault(one, "new") == "again" and known.get(Thing(), None) is None
    assert other in known and Thing() not in known
    with pytest.raises(KeyError):
        known[Thing()]
    del one
    gc.collect()
    assert list(known) == [other]


def test_values_of_what_has_gone_go_when_the_next_comes():
    known, key, value = WeakMap(), Thing(), Thing()
    known[key], seen = value, weakref.ref(value)
    del key, value
    last = Thing()
    known[last] = None
    assert seen() is None and list(known) == [last]


def test_an_object_is_only_itself():
    one, equal = Equal(), Equal()
    assert one == equal
    known = WeakMap()
    assert known.setdefault(one, 1) == 1 and known.setdefault(equal, 2) == 2 and known.setdefault(one, 3) == 1
    assert equal in known and Equal() not in known


def test_a_set_has_its_things_once_in_their_order():
    things = [Thing() for _ in range(5)]
    known = WeakSet()
    for thing in (*things, *things):
        known.add(thing)
    assert list(known) == things
    del things[1]
    gc.collect()
    assert list(known) == things


def test_one_that_goes_while_others_are_looked_at_is_passed_over():
    things = [Thing() for _ in range(3)]
    known = WeakSet()
    for thing in things:
        known.add(thing)
    seen = []
    for thing in known:
        seen.append(thing)
        del things[1:]
    assert seen == things


def test_several_threads_lose_nothing():
    known, kept = WeakSet(), []

    def add():
        for _ in range(2000):
            kept.append(Thing())
            known.add(kept[-1])
            known.add(Thing())

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(known) == set(kept)


class Interrupts(weakref.ref):
    """Ctrl-C comes when the object goes, before what was told to watch it earlier hears of that."""

    def __new__(cls, watched):
        return super().__new__(cls, watched, operator.methodcaller("interrupt"))  # none of it is Python code

    def __init__(self, watched):
        super().__init__(watched, None)
        self.interrupt = functools.partial(_thread.interrupt_main)


def test_no_ctrl_c_is_lost_when_something_goes():
    """With weakref.WeakSet it is."""
    thing, known, values = Thing(), WeakSet(), WeakMap()
    known.add(thing)
    values[thing] = "value"
    watch = Interrupts(thing)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            del thing
            for _ in range(10):  # Python looks for signals at the end of each
                pass
    finally:
        signal.signal(signal.SIGINT, before)
    assert watch() is None
