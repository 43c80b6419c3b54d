"""`bench/moe_layer.py` with something wrong in the all-to-all layers, or gloo in NCCL's place.

The first argument names it; the others are the benchmark's.
"""

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

from bench import moe_layer
from bench.systems import all_to_all_layer, layers

FAULT = sys.argv.pop(1)
move = all_to_all_layer.MpiExchange._move
backward = all_to_all_layer._AllToAll.backward


def lose_a_row(self, source, into, rows, into_rows):
    move(self, source, into, rows, into_rows)
    if self.rank == 1 and into.is_floating_point():
        into[0] = 0


def half_the_gradient(ctx, grad):
    return backward(ctx, grad / 2)


if FAULT == "mpi-loses-a-row":
    all_to_all_layer.MpiExchange._move = lose_a_row
elif FAULT == "half-the-gradient":
    all_to_all_layer._AllToAll.backward = staticmethod(half_the_gradient)
elif FAULT == "nccl-is-gloo":
    moe_layer.Place = functools.partial(layers.Place, backend="gloo")
moe_layer.main()
