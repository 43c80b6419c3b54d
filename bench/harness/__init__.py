"""What all benchmarks need. It imports nothing itself: ``facts`` is for programs without PyTorch, too."""
