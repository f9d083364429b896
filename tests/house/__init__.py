"""Tests of the repository's own rules: bars, floors, commands."""
