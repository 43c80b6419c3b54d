"""The package ``bench`` for its programs when they are run by their path.

Python then looks for modules beside the program, so that ``import bench`` finds this file instead of the
folder. With a ``__path__`` it is that package: ``bench.harness`` and the rest are found where they are.
"""

from pathlib import Path

__path__ = [str(Path(__file__).parent)]
