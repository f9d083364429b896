"""The exceptions that a command shows as one line, and the exit status of each."""


class UsageError(ValueError):
    """A flag, setting or file of the user cannot be used as given: exit status 2.

    The message is one line and is raised before anything is compiled.
    """


class RunError(RuntimeError):
    """A run cannot go on: storage, numbers, a worker or an evaluator failed. Exit status 1."""


class CheckpointError(RunError):
    """Checkpoints cannot be written, or none of those present can be read."""
