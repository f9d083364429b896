"""Pallas kernels, each beside the plain-JAX function that defines it; none before the VCC and SMILE kernels land."""
