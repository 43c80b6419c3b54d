"""All systems of bench/dispatch_combine.py on both paths, where ranks have different numbers of tokens.

    mpirun -n 3 python tests/programs/uneven_tokens.py bf16 5,0,3 1,1,1

Rank 0 prints each case with the number of answers that were right, and whatever was wrong.
"""

import sys
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

from bench.cpu_paths import DTYPES
from bench.harness.launch import Launch
from bench.harness.layer_job import LayerJob
from bench.harness.workload import Job, Shape
from bench.systems.commlib import LIMIT
from bench.systems.cpus import CHOICES, LAYER, PATHS, open_systems

with Launch.session() as launch:
    for case in sys.argv[2:]:
        tokens = [int(count) for count in case.split(",")]
        assert len(tokens) == launch.size
        shape = Shape(max(tokens), 48, 4 * launch.size, 3, DTYPES[sys.argv[1]], seed=5)
        for path in PATHS:
            job = Job.build(shape, launch.rank, launch.size, tokens=tokens)
            if path == LAYER:
                job = LayerJob.of(job, shape, launch.rank, launch.size)
            wrong, right = [], []
            with open_systems(launch, shape, path, set(CHOICES)) as systems:
                for system in systems + systems[::-1]:  # each twice, with others in between
                    before = len(wrong)
                    system.iterate(job, launch, wrong.append)
                    if len(wrong) == before and system.name != LIMIT:
                        right.append(system.name)
            wrong = list(chain(*launch.gather(wrong)))
            right = list(chain(*launch.gather(right)))
            if launch.rank == 0:
                names = ", ".join(f"{name} {right.count(name)}" for name in sorted(set(right)))
                print(f"{case} {path}: {names}; wrong: {wrong}", flush=True)
