"""commlib under software of others: one module for each, which imports that software."""
