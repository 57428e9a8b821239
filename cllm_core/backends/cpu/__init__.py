"""Kernels in C for what is left of a CPU step beside its matrix products."""
