"""Descriptors from process to process at start-up: memfds stand for device memory."""

import glob
import json
import os
import socket
import tempfile
from array import array

import pytest
from processes import HANG_SECONDS, FileGroup, descriptors, memory_of, no_more_descriptors

from commlib.errors import CommError
from commlib.startup import fd_exchange
from commlib.startup.fd_exchange import _Exchange, close_fds, exchange_fds
from commlib.startup.group import Group

NOBODY = 65534
LONG = 600.0  # seconds: a test that waits for this deadline is cut off, and fails

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")


@pytest.fixture
def room(monkeypatch):
    """An empty directory for temporary files, open to all users; nothing may be left in it."""
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        monkeypatch.setattr(tempfile, "tempdir", place)
        yield place
        monkeypatch.undo()


def addresses_of(group, fd):
    return group.allgather((os.getpid(), fd, 16, b"handle %d" % group.rank, b"net"))


def exchange(group, timeout=LONG):
    """Exchanges, and checks that no descriptor is left if that fails."""
    addresses = addresses_of(group, memory_of(group.rank))
    before = descriptors()
    try:
        return exchange_fds(group, addresses, list(range(group.size)), timeout), addresses
    except CommError:
        assert descriptors() == before
        raise


# -- what it is for ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 5])
def test_each_rank_gets_the_memory_of_every_other(in_processes, room, ranks):
    def main(group):
        before = descriptors()
        for _ in range(2):
            got, addresses = exchange(group)
            assert got[group.rank] == addresses[group.rank]
            assert [os.pread(a[1], 99, 0) for a in got] == [b"heap of rank %d" % r for r in range(ranks)]
            assert all(not os.get_inheritable(a[1]) for a in got)
            assert [a[:1] + a[2:] for a in got] == [a[:1] + a[2:] for a in addresses]
            close_fds(got, range(ranks))
            os.close(got[group.rank][1])
        return descriptors() - before

    assert in_processes(main, ranks) == [0] * ranks
    assert os.listdir(room) == []


def test_only_ranks_of_the_node_are_asked(in_processes, room):
    def main(group):
        addresses = addresses_of(group, memory_of(group.rank))
        node = [[0, 2], [1], [0, 2]][group.rank]
        got = exchange_fds(group, addresses, node)
        assert all(got[rank] == addresses[rank] for rank in range(3) if rank not in node)
        return [os.pread(got[rank][1], 99, 0) for rank in node]

    ends = [b"heap of rank 0", b"heap of rank 2"]
    assert in_processes(main, 3) == [ends, [b"heap of rank 1"], ends]


def test_memory_without_descriptors_needs_no_exchange():
    class Nobody(Group):
        rank, size = 0, 2

        def allgather(self, obj):
            raise AssertionError("there is nothing to gather")

    addresses = [(1, -1, 16, b"fabric", b""), (2, -1, 16, b"fabric", b"")]
    assert exchange_fds(Nobody(), addresses, [0, 1]) == addresses


def test_ranks_of_this_process_stay_as_they_are(in_processes, room):
    def main(group):
        mine = (os.getpid(), memory_of(group.rank), 16, b"", b"")
        return exchange_fds(group, [mine, (os.getpid(), 77, 16, b"", b"")], [0, 1])[1][1]

    assert in_processes(main, 1) == [77]


# -- strangers -----------------------------------------------------------------------------------------------


def as_stranger(user, act):
    """What ``act`` returns in another process, which runs as ``user`` unless None."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        if user is not None:
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
        try:
            said = act()
        except OSError as error:
            said = type(error).__name__
        os.write(write, str(said).encode())
        os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    said = os.read(read, 999).decode()
    os.close(read)
    return said


def push(path, rank):
    """Sends a descriptor in a rank's name; returns how the connection ends."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as out:
        out.connect(path)
        out.settimeout(HANG_SECONDS)
        fds = array("i", [os.memfd_create("not what you want")])
        out.sendmsg([str(rank).encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
        return out.recv(16) or "closed"


class BesetGroup(FileGroup):
    """Strangers come to rank 1 before rank 0 does."""

    def beset(self, act):
        self.act, self.said = act, None
        return self

    def allgather(self, obj):
        got = super().allgather(obj)
        if self.rank == 0 and isinstance(got[1], bytes) and self.said is None:
            self.said = self.act(json.loads(got[1]))
        return got


def beset(group, act):
    self = BesetGroup(group.place, group.rank, group.size).beset(act)
    got, _ = exchange(self)
    return os.pread(got[1 - self.rank][1], 99, 0), self.said


@as_root
def test_another_user_is_not_let_in(in_processes, room):
    def act(path):
        by_name = glob.glob(f"{room}/commlib-*")
        assert len(by_name) == 2
        return [as_stranger(NOBODY, lambda p=p: push(p, 0)) for p in (path, *(f"{d}/rank" for d in by_name))]

    (_, said), (memory, _) = in_processes(lambda group: beset(group, act), 2)
    assert said == ["PermissionError"] * 3
    assert memory == b"heap of rank 0"


@pytest.mark.parametrize("user", [pytest.param(NOBODY, marks=as_root), None])
def test_a_stranger_that_gets_in_is_ignored(in_processes, room, user):
    def act(path):
        for directory in glob.glob(f"{room}/commlib-*"):
            os.chmod(directory, 0o755)
            os.chmod(f"{directory}/rank", 0o777)
        ours = os.path.realpath(os.path.dirname(path))  # rank 1's
        return as_stranger(user, lambda: push(f"{ours}/rank", 0))

    (_, said), (memory, _) = in_processes(lambda group: beset(group, act), 2)
    assert said in ("closed", "ConnectionResetError", "BrokenPipeError")
    assert memory == b"heap of rank 0"


@as_root
def test_the_right_process_of_the_wrong_user_is_a_stranger(room):
    path = f"{room}/socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen(2)
        os.chmod(path, 0o777)
        for user, known in ((NOBODY, False), (None, True)):
            said = as_stranger(user, lambda: [os.getpid(), socket.socket(1, 5).connect(path)][0])
            with listener.accept()[0] as connection:
                assert fd_exchange._is_of(connection, {int(said)}) == known
                assert not fd_exchange._is_of(connection, {int(said) + 1})


# -- ranks that fail -----------------------------------------------------------------------------------------


def instead_of_trading(monkeypatch, rank, act):
    """``act(exchange, *args)`` on this rank, in place of sending and receiving."""
    trade = _Exchange.trade

    def or_act(self, places, own, *args):
        return (act if own == rank else trade)(self, places, own, *args)

    monkeypatch.setattr(_Exchange, "trade", or_act)


def test_a_rank_that_sends_nothing_is_named_when_the_time_is_over(in_processes, room, monkeypatch):
    instead_of_trading(monkeypatch, 1, lambda *_: None)
    texts = in_processes(lambda group: exchange(group, timeout=0.2), 2)
    assert texts[0] == texts[1]
    assert texts[0].startswith("CommError: rank 0 could not exchange memory"), texts
    assert "rank 1 (process " in texts[0] and "did not send within 0.2 s" in texts[0]
    assert os.listdir(room) == []


def test_a_rank_that_dies_is_named_at_once(in_processes, tmp_path, room, monkeypatch):
    instead_of_trading(monkeypatch, 1, lambda self, places, own, *_: FileGroup(tmp_path, own, 3).leave())
    texts = in_processes(exchange, 3)
    for rank in (0, 2):
        assert texts[rank].startswith(f"CommError: rank {rank} could not exchange memory"), texts
        assert "rank 1 (process " in texts[rank] and "died, or gave up" in texts[rank]
    assert texts[1] is None


def test_a_rank_without_room_for_descriptors_tells_all_others(in_processes, room, monkeypatch):
    trade = _Exchange.trade

    def with_few_descriptors(self, *args):
        with no_more_descriptors():
            trade(self, *args)

    instead_of_trading(monkeypatch, 2, with_few_descriptors)
    texts = in_processes(exchange, 3)
    assert len(set(texts)) == 1
    assert "rank 2 could not exchange memory" in texts[0] and "Too many open files" in texts[0]
    assert os.listdir(room) == []


def test_a_rank_that_cannot_begin_tells_all_others(in_processes, room):
    def main(group):
        if group.rank == 1:
            tempfile.tempdir = f"{room}/missing"
        return exchange(group)

    texts = in_processes(main, 3)
    assert len(set(texts)) == 1
    assert "rank 1 could not exchange memory" in texts[0] and "FileNotFoundError" in texts[0]
    assert os.listdir(room) == []


# -- what comes in -------------------------------------------------------------------------------------------


@pytest.fixture
def pair():
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    yield ends
    for end in ends:
        end.close()


def send(end, said, count=1):
    fds = [os.memfd_create("sent") for _ in range(count)]
    end.sendmsg([said], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else [])
    for fd in fds:
        os.close(fd)


def test_a_descriptor_for_which_there_is_no_room_is_an_error_that_says_so(pair):
    send(pair[0], b"1")
    before = descriptors()
    with no_more_descriptors(), pytest.raises(OSError, match="Is the limit of open files reached"):
        fd_exchange._receive_fds(pair[1])
    assert descriptors() == before


def test_more_descriptors_than_one_are_an_error_and_none_is_kept(pair):
    send(pair[0], b"1", count=3)
    before = descriptors()
    with pytest.raises(OSError, match="could not be received"):
        fd_exchange._receive_fds(pair[1])
    assert descriptors() == before


@pytest.mark.parametrize(
    ("said", "count"), [(b"2", 1), (b"x", 1), ("\u00b2".encode(), 1), (b"-1", 1), (b"1", 0), (b"", 1)]
)
def test_what_is_no_rank_with_a_descriptor_is_dropped(pair, said, count):
    with _Exchange({1: os.getpid(), 2: os.getpid() + 1}) as mine:
        before = descriptors()
        send(pair[0], said, count)
        mine._receive(pair[1])
        assert descriptors() == before
        send(pair[0], b"1")
        mine._receive(pair[1])
        send(pair[0], b"1")  # twice
        mine._receive(pair[1])
        assert descriptors() == before + 1
        assert list(mine._received) == [1]
    assert descriptors() == before
