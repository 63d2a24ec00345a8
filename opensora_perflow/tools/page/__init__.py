"""A report of runs: one HTML page that opens from disk and asks for nothing else."""
