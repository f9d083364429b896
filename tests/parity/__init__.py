"""Parity with the original implementations: `python -m tests.parity FILE...`."""
