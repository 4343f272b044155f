"""What a run tells its user by ending."""


class UserError(ValueError):
    """A mistake the user can mend: one line that names the thing and the remedy; exit code 2."""


class Interrupted(Exception):
    """The run was asked to stop and has written its checkpoint.

    Attributes:
        signal: SIGINT (Ctrl-C) or SIGTERM (preemption); the exit code is 128 plus its number.
    """

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal
