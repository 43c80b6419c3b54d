"""Read by every Python that has this folder in PYTHONPATH, those that tests start included."""

import os

if built := os.environ.get("SIMULATED_GPU"):
    import standin

    standin.install(built)
