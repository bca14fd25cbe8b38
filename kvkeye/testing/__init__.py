"""Case tables, comparers and small random models: what tests and benchmarks share."""
