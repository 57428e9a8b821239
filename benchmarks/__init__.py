"""Measurements: run by hand, with results under `results/`."""
