"""Bytes to pixels, in worker processes or in this one. No torch: a worker starts fast and stays small."""
