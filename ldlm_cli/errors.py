"""The errors a user can meet. Each message is one sentence: what, where, what to change."""


class LdlmError(Exception):
    """Something failed while running; the command ends with exit code 1."""

    exit_code = 1


class UsageError(LdlmError):
    """Wrong use: an option, a path, a missing extra, an unreachable hub; exit code 2."""

    exit_code = 2


class RecipeError(UsageError):
    """The recipe is missing, misspelt, ill-typed or contradicts itself."""


class DataError(UsageError):
    """The text is missing, unreadable, empty or too short."""


class SnapshotError(UsageError):
    """A run, checkpoint or snapshot is missing, damaged or of another format version."""


class StoppedBySignal(LdlmError):
    """Training was asked to stop; the step was finished and a checkpoint saved. Exit code 130 or 143."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


class ShapeError(LdlmError):
    """A tensor has the wrong shape; the message gives the shape expected and the shape got."""
