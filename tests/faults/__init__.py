"""The faults that a run has to survive, one named test each (numbers as in docs/reliability.md)."""
