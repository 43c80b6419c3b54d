"""What ranks say to each other at start-up: which are missing, which have failed, and how they try again."""

import pickle
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

import commlib
from commlib import ExpertParallel
from commlib.devices import cpu
from commlib.settings import Settings
from commlib.startup import connect, inprocess
from commlib.startup.conversation import Group, about_absent, gather
from commlib.startup.group import StoreGroup, ThreadGroup

CONFIG = {"num_experts": 8, "hidden": 64, "topk": 2, "max_tokens": 8, "dtype": "float32", "device": "cpu"}
LONG = 100.0  # seconds: a failure reported only at this deadline would exceed a test's own limit
SHORT = 0.2


class ObjectGroup(Group):
    """A user's own, written for objects: it pickles what it is given, which commlib need not know."""

    def __init__(self, meeting, said, rank):
        self._meeting, self._said, self.rank, self.size = meeting, said, rank, len(said)

    def allgather(self, obj):
        self._said[self.rank] = pickle.dumps(obj)
        self._meeting.wait(LONG)
        found = [pickle.loads(data) for data in self._said]
        self._meeting.wait(LONG)
        return found

    @classmethod
    def world(cls, size):
        meeting, said = threading.Barrier(size), [b""] * size
        return [cls(meeting, said, rank) for rank in range(size)]


def store_world(size):
    store = dist.HashStore()
    return [StoreGroup(store, rank, size) for rank in range(size)]


OURS = {"threads": ThreadGroup.world, "store": store_world}
ALL = OURS | {"a user's own": ObjectGroup.world}
ours = pytest.mark.parametrize("world", OURS.values(), ids=OURS)
all_groups = pytest.mark.parametrize("world", ALL.values(), ids=ALL)


def on_ranks(groups, main):
    """What ``main(group)`` returned or raised on each rank."""

    def caught(group):
        try:
            return main(group)
        except BaseException as error:
            return error

    with ThreadPoolExecutor(len(groups)) as pool:
        return list(pool.map(caught, groups))


def construct(group, **config):
    with ExpertParallel(group, **{**CONFIG, "startup_timeout": LONG, **config}) as ep:
        return ep.size


# -- gathers


@all_groups
def test_every_rank_has_what_every_rank_said(world):
    def main(group):
        with group.converse(LONG) as talk:
            first = gather(talk, "first", {"rank": group.rank, "pair": (1, None)})
            return first, gather(talk, "second", "x" * group.rank)

    expected = [{"rank": rank, "pair": [1, None]} for rank in range(3)], ["", "x", "xx"]
    assert on_ranks(world(3), main) == [expected] * 3


@all_groups
def test_constructions_and_barriers_follow_each_other(world):
    def main(group):
        for _ in range(3):
            construct(group)
            group.barrier()
        return group.allgather(b"%d" % group.rank)

    assert on_ranks(world(2), main) == [[b"0", b"1"]] * 2


def test_groups_are_given_bytes():
    groups = ObjectGroup.world(2)

    def main(group):
        construct(group)
        return {type(pickle.loads(data)) for data in group._said}

    assert on_ranks(groups, main) == [{bytes}] * 2


@pytest.mark.parametrize(
    ("said", "text"),
    [([b"=1"], "gave 1 things"), ([b"=1", 1], "gave 2 things, a int among them"), ([], "gave 0 things")],
)
def test_a_group_that_gathers_something_else_is_refused(said, text):
    class Wrong(Group):
        rank, size = 0, 2

        def allgather(self, data):
            return said

    with pytest.raises(TypeError, match=rf"Wrong.allgather must return bytes of 2 ranks, it {text}$"):
        construct(Wrong())


def test_what_is_not_json_is_an_error_and_never_unpickled():
    store = dist.HashStore()
    group = StoreGroup(store, 0, 2)

    class Trap:
        def __reduce__(self):
            return pytest.fail, ("unpickled",)

    dist.PrefixStore("commlib/0/2", store).set("1/0/1", pickle.dumps(Trap()))
    with pytest.raises(commlib.CommError, match=r"at step settings: rank 1 said .* another version"):
        construct(group)


def test_little_is_left_behind():
    groups = ThreadGroup.world(2)

    def main(group):
        for _ in range(20):
            group.barrier()

    on_ranks(groups, main)
    assert len(groups[0]._board.posts) <= 4


# -- ranks that do not come


@ours
def test_all_missing_ranks_are_named(world):
    groups = world(4)
    errors = on_ranks([groups[0], groups[2]], lambda group: construct(group, startup_timeout=SHORT))
    for error in errors:
        assert isinstance(error, commlib.PeerTimeout)
        assert error.peers == [1, 3]
        assert "at step settings: ranks 1, 3 did not come within 0.2 s" in str(error)


@ours
def test_after_a_rank_was_missing_all_can_try_again(world):
    """It need not know that the others waited for it: it may have failed before it could."""
    groups = world(3)
    errors = on_ranks(groups[:2], lambda group: construct(group, startup_timeout=SHORT))
    assert all(isinstance(error, commlib.PeerTimeout) for error in errors)
    assert on_ranks(groups, construct) == [3] * 3


@ours
def test_the_timeout_bounds_start_up_unless_told_otherwise(world):
    (error,) = on_ranks(world(2)[:1], lambda group: construct(group, startup_timeout=None, timeout=SHORT))
    assert isinstance(error, commlib.PeerTimeout) and "within 0.2 s" in str(error)


@pytest.mark.parametrize("asked", ["has_left", "has_exited"])
def test_a_rank_that_comes_and_goes_between_two_looks_has_come(asked):
    looked, gone = threading.Event(), threading.Event()

    def main(group):
        if group.rank == 0:
            assert looked.wait(LONG)
            group.barrier()
            group.leave("gone")
            gone.set()
            return

        def after_it_has_gone(ranks):
            looked.set()
            assert gone.wait(LONG)
            return type(group).why_gone(group, ranks)

        with group.converse(LONG) as talk:
            if asked == "has_left":
                group.why_gone = after_it_has_gone
            else:
                group.why_gone = lambda ranks: None
                talk.watch = lambda rank: ("exited", [rank]) if after_it_has_gone([rank]) else None
            talk.barrier()
            assert gone.is_set() and not talk.over

    assert on_ranks(ThreadGroup.world(2), main) == [None, None]


def test_who_will_never_come_and_who_is_to_blame_for_that_is_said():
    def about(**why):
        return about_absent(range(8), {int(name[1:]): it for name, it in why.items()}.get)

    assert about() is None
    assert about(r2=("exited", [2])) == ("the process of rank 2 has exited", [2])
    assert about(r1=("exited", [1]), r2=("exited", [2])) == (
        "the processes of ranks 1, 2 have exited",
        [1, 2],
    )
    assert about(r1=("exited", [2]), r2=("lost", [2]), r4=("departed", [0, 2]), r5=("departed", [2])) == (
        "the process of rank 1 has exited; the connection to rank 2 was lost; "
        "ranks 4, 5 closed the communicator or failed; "
        "ranks 1, 5 had given up on rank 2; rank 4 had given up on ranks 0, 2",
        [0, 2],
    )


def test_a_rank_to_blame_that_comes_late_is_told_so():
    """Rank 1 has exited, because it had given up on rank 2, which is late: nobody waited for that one."""
    store = dist.HashStore()
    groups = [StoreGroup(store, rank, 3) for rank in range(3)]
    told = pytest.raises(commlib.PeerTimeout, match="rank 1 had given up on rank 2")
    with told as first, groups[0].converse(LONG) as talk:
        talk.watch = {0: None, 1: ("exited", [2]), 2: None}.get
        talk.barrier()
    with (
        pytest.raises(commlib.PeerTimeout, match="rank 0 could not start") as second,
        groups[2].converse(LONG) as talk,
    ):
        talk.barrier()
    assert first.value.peers == second.value.peers == [2]
    with groups[1].converse(SHORT) as talk:  # a rank that had not come goes on to the next one
        assert talk.name == "2"


def test_a_rank_that_returns_early_is_named():
    def rank_main(rank):
        return rank if rank == 1 else construct(None)

    with pytest.raises(commlib.CommError, match="rank 1 has returned from its function"):
        commlib.run_ranks(rank_main, 3)


# -- ranks that fail

BAD = {
    "device": dict(device="bogus"),
    "timeout": dict(timeout="a"),
    "huge timeout": dict(timeout=10**400),
    "startup_timeout": dict(startup_timeout=-1),
    "slots": dict(slots=9.5),
    "partition": dict(partition=3),
    "link": dict(link_gbps=10**400),
    "dtype": dict(dtype=None),
    "routing": dict(routing=["auto"]),
    "ranks_per_node": dict(ranks_per_node=1.5),
}


@all_groups
@pytest.mark.parametrize("name", BAD)
def test_an_argument_that_one_rank_cannot_use_is_reported_to_all(world, name):
    errors = on_ranks(world(3), lambda group: construct(group, **(BAD[name] if group.rank == 1 else {})))
    assert isinstance(errors[1], TypeError | ValueError)
    for error in errors[::2]:
        assert isinstance(error, commlib.CommError)
        assert str(error) == f"rank 1 could not start: {type(errors[1]).__name__}: {errors[1]}"


def failing_on(rank, owner, name, error, monkeypatch):
    """Let a function fail on the thread that has this rank's name."""
    right = getattr(owner, name)

    def or_fail(*args):
        if threading.current_thread().name == f"rank {rank}":
            raise error
        return right(*args)

    monkeypatch.setattr(owner, name, or_fail)


@all_groups
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (cpu.Cpu, "facts"),
        (connect, "_compare"),
        (connect, "_config"),
        (connect, "_make_and_connect"),
        (cpu, "CpuBackend"),
    ],
)
@pytest.mark.parametrize("error", [KeyboardInterrupt(), AssertionError("no"), MemoryError()], ids=repr)
def test_a_rank_that_fails_anywhere_tells_all_others(world, owner, name, error, monkeypatch):
    def main(group):
        threading.current_thread().name = f"rank {group.rank}"
        return construct(group)

    groups = world(3)
    with monkeypatch.context() as patched:
        failing_on(2, owner, name, error, patched)
        errors = on_ranks(groups, main)
    assert errors[2] is error
    for other in errors[:2]:
        assert isinstance(other, commlib.CommError)
        assert str(other).startswith(f"rank 2 could not start: {type(error).__name__}")
    assert on_ranks(groups, main) == [3] * 3


@ours
def test_a_failure_is_reported_while_a_third_rank_is_awaited(world):
    groups = world(3)  # rank 2 never comes
    errors = on_ranks(groups[:2], lambda group: construct(group, topk=2 - 2 * group.rank))
    assert isinstance(errors[1], ValueError)
    assert "rank 1 could not start: ValueError: topk" in str(errors[0])


def test_ranks_of_other_builds_are_refused(monkeypatch):
    monkeypatch.setattr(
        connect,
        "_build",
        lambda _: {"build": "1.0 new" if "1" in threading.current_thread().name else "1.0 old"},
    )

    def rank_main(rank):
        with pytest.raises(commlib.ConfigMismatch) as caught:
            construct(None)
        return str(caught.value)

    text = "ranks disagree: build is 1.0 old on rank 0, 2, 1.0 new on rank 1: install the same commlib on all"
    assert commlib.run_ranks(rank_main, 3) == [text] * 3


def test_the_build_is_known_here():
    said = connect._build(Settings(8, 64, 2, 8, torch.float32, torch.device("cpu"), None, None, 8, 1.0))
    assert said["build"].startswith(f"{commlib.__version__} ") and "unknown" not in said["build"]


# -- torchrun starts its ranks again


def test_what_an_earlier_attempt_left_in_the_store_is_ignored(monkeypatch):
    store = dist.HashStore()

    def attempt(number, ranks):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(number))
        groups = [StoreGroup(store, rank, 2) for rank in ranks]
        return on_ranks(groups, lambda group: construct(group, startup_timeout=LONG if number else SHORT))

    assert isinstance(attempt(0, [0])[0], commlib.PeerTimeout)
    assert attempt(1, [0, 1]) == [2, 2]


def test_nodes_need_not_agree_on_the_number_of_the_attempt(monkeypatch):
    store = dist.HashStore()
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    for attempts in ((0, 0), (0, 1), (2, 1)):
        groups = []
        for rank, attempt in enumerate(attempts):
            monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
            groups.append(StoreGroup(store, rank, 2))
        assert on_ranks(groups, construct) == [2, 2]


# -- Ctrl-C


def test_ctrl_c_ends_ranks_that_wait_and_leaves_those_that_do_not(monkeypatch):
    monkeypatch.setattr(inprocess, "_STOP_SECONDS", SHORT)
    ended, release = {}, threading.Event()

    def rank_main(rank):
        if rank == 2:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            release.wait(LONG)
            return
        try:
            construct(None)
        except commlib.CommError as error:
            ended[rank] = str(error)
            raise

    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        commlib.run_ranks(rank_main, 3)
    assert time.monotonic() - begin < LONG / 2
    for thread in threading.enumerate():
        if thread.name in ("commlib-rank-0", "commlib-rank-1"):
            thread.join(LONG)
    release.set()
    assert ended == dict.fromkeys((0, 1), "run_ranks was ended by KeyboardInterrupt")
