"""The formulas: windows, times, solvers, processes, guidance, sampling. Knows no network, no host, no file."""
