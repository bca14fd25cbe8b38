"""The case tables, one module per op family."""
