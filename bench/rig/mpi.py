"""Open MPI over a rig's nodes (netns.py): one mpirun on node 0, its ranks on all of them, node after node.

mpirun starts its daemons on other nodes with a program that takes ``ssh``'s arguments, here a script that
enters the node's namespace. Between nodes ranks use TCP over the link, within a node shared memory.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.rig.netns import INTERFACE, Rig

# What mpirun passes from node 0's environment to ranks on the other nodes; the agent sets their own.
_EVERYWHERE = ("PATH", "PYTHONPATH", "OMP_NUM_THREADS", "TORCH_CPP_LOG_LEVEL")


@contextmanager
def mpirun(
    rig: Rig, ranks_per_node: int, argv: Sequence[str], **options: Any
) -> Iterator[subprocess.Popen[Any]]:
    """Start a program under mpirun, ``ranks_per_node`` on every node; return mpirun's process."""
    with TemporaryDirectory(prefix="commlib-mpi-") as folder:
        agent, hosts = Path(folder, "agent"), Path(folder, "hosts")
        agent.write_text(_agent(rig))
        agent.chmod(0o755)
        hosts.write_text("".join(f"{node.address} slots={ranks_per_node}\n" for node in rig.nodes))
        command = [
            *("mpirun", "--oversubscribe", "--hostfile", str(hosts), "--map-by", "slot"),
            *("-n", str(ranks_per_node * len(rig.nodes))),
            *(["--allow-run-as-root"] if os.geteuid() == 0 else []),
            *("--prtemca", "plm", "ssh", "--prtemca", "plm_ssh_agent", str(agent)),
            *("--prtemca", "prte_if_include", INTERFACE),
            *("--mca", "pml", "ob1", "--mca", "btl", "self,sm,tcp", "--mca", "btl_tcp_if_include", INTERFACE),
            # More ranks than cores: a rank that waits must let others run. Open MPI sees only its own node.
            *("--mca", "mpi_yield_when_idle", "true"),
            *(word for name in _EVERYWHERE if name in os.environ for word in ("-x", name)),
        ]
        yield rig.popen(0, [*command, *argv], **options)


def _agent(rig: Rig) -> str:
    """A script that, given a node's address and a command, does what ssh does."""
    lines = ["#!/bin/sh", "address=$1; shift", "case $address in"]
    for node in rig.nodes:
        environment = [f"{name}={value}" for name, value in node.environment().items()]
        inside = shlex.join(node.command(["env", *environment, "sh", "-c"]))
        lines.append(f'{node.address}) exec {inside} "$*" ;;')
    return "\n".join([*lines, "esac", 'echo "no node $address" >&2', "exit 1", ""])
