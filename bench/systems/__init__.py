"""What benchmarks compare."""
