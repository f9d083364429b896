"""jaxmodels: ten published methods as functional Flax modules for TPU and GPU."""

__version__ = "0.1.0"
