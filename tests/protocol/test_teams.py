"""What all communicators of a rank with the same others have in common: timeout, failure, a report."""

import os
import signal
import time

import pytest
from processes import with_torch
from test_sharing import IDX, X, check_sums, made, round_trip
from torch.distributed.device_mesh import init_device_mesh

import commlib
from commlib import CommError, PeerTimeout


def test_timeouts_are_the_teams():
    def rank_main(rank):
        with made(timeout=30.0) as first, made(timeout=None) as second, made(timeout=None, hidden=32) as wide:
            with pytest.raises(ValueError, match=r"timeout=20, but .* whose timeout is 30.*exclusive=True"):
                made(timeout=20.0)
            with pytest.raises(ValueError, match="timeout=20"):
                made(timeout=20.0, hidden=128)
            with made(timeout=20.0, exclusive=True) as own:
                assert own.timeout == 20.0
                own.timeout = 21.0
            assert [ep.timeout for ep in (first, second, wide)] == [30.0] * 3
            second.timeout = 40.0
            assert [ep.timeout for ep in (first, second, wide)] == [40.0] * 3
            assert [ep.settings.timeout for ep in (first, second, wide)] == [40.0] * 3
            with made(timeout=None) as third:
                assert third.timeout == 40.0
            check_sums(first)
        with made(timeout=20.0) as anew:
            assert anew.timeout == 20.0
        with made(timeout=None) as anew:
            assert anew.timeout == 600.0

    commlib.run_ranks(rank_main, 2)


def test_a_timeout_that_one_rank_may_not_ask_for_is_told_to_all():
    def rank_main(rank):
        with made(timeout=30.0) as first:
            with pytest.raises((ValueError, CommError), match="timeout=20, but communicators of the same"):
                made(timeout=20.0 if rank == 1 else None)
            check_sums(first)
            with made(timeout=None) as second:
                check_sums(second)

    commlib.run_ranks(rank_main, 2)


def test_a_team_fails_together_and_the_next_is_new(device):
    """Who waits in one communicator hears of what failed in another; exclusive ones go on."""

    def rank_main(rank):
        narrow, wide = made(device, timeout=1.0), made(device, timeout=None, hidden=128)
        own = made(device, exclusive=True)
        x = X.to(narrow.device).repeat(1, 2)
        own.group.barrier()
        if rank == 0:
            with pytest.raises(PeerTimeout, match=r"rank 0 waited .* for rank 1"):
                round_trip(narrow)
                narrow.synchronize()
        else:
            wide.timeout = 60.0
            began = time.monotonic()
            with pytest.raises(CommError):  # rank 0 never comes here, and says after a second that it failed
                wide.dispatch(x, IDX.to(x.device))
                wide.synchronize()
            assert time.monotonic() - began < 30
        for ep in (narrow, wide):
            with pytest.raises(CommError):
                ep.dispatch(x[:, : ep.settings.hidden], IDX.to(x.device))
        check_sums(own)
        with made(device, timeout=30.0) as anew:  # also another timeout: the old team is of no use
            assert anew._comm is not narrow._comm
            check_sums(anew)

    commlib.run_ranks(rank_main, 2, device=device)


def test_groups_of_a_mesh_share_within_each_and_not_across(torch_ranks):
    def main(rank):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
        eps = [made(group=group) for group in (mesh["ep"], mesh["ep"].get_group(), mesh["dp"], None)]
        for ep in eps[:3]:
            check_sums(ep)
        communicators = [ep._comm.uid for ep in eps]
        teams = [ep._comm.team.uid for ep in eps]
        return communicators, teams

    said = torch_ranks(main, 4)
    for communicators, teams in said:
        assert communicators[0] == communicators[1]
        assert len(set(communicators)) == len(set(teams)) == 3
    assert said[0][0][0] == said[1][0][0] != said[2][0][0] == said[3][0][0]


def test_shapes_that_differ_have_regions_of_their_own_in_one_team(capsys):
    def rank_main(rank):
        eps = [made(hidden=hidden) for hidden in (64, 128, 64)]
        core = [ep._comm.core for ep in eps]
        assert core[0] is core[2] is not core[1]
        assert len({ep._comm.team for ep in eps}) == 1
        report = eps[0].memory_report() if rank == 0 else None
        if report:
            (other,) = report.others
            assert (report.layers, other.layers) == (2, 1)
            assert report.slots == other.slots == 128
            assert report.reserved == core[0].heap_bytes < other.reserved == core[1].heap_bytes
        eps[0].group.barrier()

    commlib.run_ranks(rank_main, 2)
    out = capsys.readouterr().out
    assert "8 experts on 2 ranks, top 2, rows of 64 float32, used by 2 ExpertParallels: heap" in out
    assert "8 experts on 2 ranks, top 2, rows of 128 float32, used by 1 ExpertParallel: heap" in out


@pytest.mark.parametrize("hidden", [64, 32])
def test_joining_hears_that_a_rank_is_gone(in_processes, hidden):
    """From a communicator that is there, not after the time for start-up."""

    def main(group):
        first = made(startup_timeout=50.0)
        check_sums(first)
        if first.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        with pytest.raises(PeerTimeout, match="the process of rank 1 has exited") as raised:
            made(hidden=hidden, startup_timeout=50.0)
        return raised.value.peers

    assert in_processes(with_torch(main), 2)[0] == [1]
