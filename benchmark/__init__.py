"""Measurements of margingate, run from the checkout: `python -m benchmark.speed.decode_step`."""
