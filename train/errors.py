"""The one exception that means "asked for wrongly": shown as a line, exit status 2."""


class UsageError(ValueError):
    """A flag, setting or file of the user cannot be used as given; the message is one line."""
