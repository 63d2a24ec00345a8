"""Small models with known answers, for the demo, tests and benchmarks."""
