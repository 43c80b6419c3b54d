"""Benchmarks: programs here, on three shelves, each of which knows only those above it.

* ``bench.harness``: ranks and their clocks, the job they are given, samples, tables, facts about the machine.
* ``bench.rig``: nodes on one machine whose links are limited for real.
* ``bench.systems``: what is compared: commlib, gloo, MPI, NCCL, other libraries, whole layers.

Programs are run by their path, as in ``mpirun -n 4 python bench/dispatch_combine.py``, or as modules. Some
have parts in files of their own: ``dispatch_combine`` has ``cpu_paths``, ``limited_link`` and
``gpu_comparison``; ``gpu`` has ``gpu_measure``; ``nodes`` has ``nodes_rank``; ``overlap`` has
``overlap_matmul`` and ``overlap_layer``.
"""
