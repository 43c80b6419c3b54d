"""The clocks of calibration and benchmarks."""

import time

import commlib
from commlib.cli.measuring import HostClock, clock_for, host_facts
from commlib.startup.group import SingleGroup, resolve_group


def test_ranks_that_share_a_gpu_have_its_clock_and_others_their_hosts(host_clock):
    def main(rank):
        clocks = [clock_for(resolve_group(), device) for device in ("cpu", "cuda")]
        return [type(clock).__name__ for clock in clocks], [clock.timed(lambda: rank)[1] for clock in clocks]

    found = commlib.run_ranks(main, 2)
    assert found == [(["HostClock", "DeviceClock"], [rank, rank]) for rank in range(2)]
    assert isinstance(clock_for(SingleGroup(), "cuda"), HostClock)  # a process for each GPU


def test_a_hosts_clock_gives_the_time_of_the_operation_and_its_result():
    seconds, result = HostClock(SingleGroup(), "cpu").timed(lambda: time.sleep(0.02) or "done")
    assert result == "done" and seconds >= 0.02


def test_facts_say_what_figures_depend_on():
    facts = host_facts()
    assert list(facts) == ["cpu", "cores", "system", "python", "torch", "commlib"]
    assert facts["commlib"] == commlib.__version__ and facts["cores"] >= 1 and facts["cpu"]
