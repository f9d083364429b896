"""Tests mirror the tree; tests/house checks the rules of the repository itself."""
