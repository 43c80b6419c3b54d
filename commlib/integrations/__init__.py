"""commlib under software that people run: a module for each, which needs that software; imported by name."""
