"""Measurements, one question a file; README.md lists them."""
