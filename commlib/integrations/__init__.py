"""commlib under other software: one module for each, which imports that software."""
