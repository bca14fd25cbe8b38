"""Distils an EAGLE-3 style draft head from a target's own answers."""
