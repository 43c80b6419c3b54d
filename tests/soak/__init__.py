"""Random faults in random runs: `python tests/soak`. Every rank of every run must end as it should."""
