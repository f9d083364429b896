"""Pallas kernels, each beside the plain-JAX function that defines it."""
