"""The one exception for mistakes a user can mend: the CLI prints it as a single line, exit code 2."""


class UserError(ValueError):
    """A one-line message that names the thing at fault and the remedy."""
