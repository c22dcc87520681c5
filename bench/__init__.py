"""`make bench`: what the project costs, in figures with targets (bench/README.md)."""
