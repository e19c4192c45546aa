"""Training and judging networks: what stages, trials and benchmarks have in common."""
