"""What a run tells its user by ending."""


class UserError(ValueError):
    """A mistake the user can mend: one line that names the thing and the remedy; exit code 2."""


class Interrupted(Exception):
    """The run was asked to stop (Ctrl-C, SIGTERM) and has written its checkpoint; exit code 130."""
