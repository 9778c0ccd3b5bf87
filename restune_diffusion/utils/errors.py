"""Errors that a user can cause and fix; each message is one sentence with the problem and the remedy."""


class RestuneError(Exception):
    """Base of every error that is shown to a user as one sentence, without a traceback."""


class UnknownFamilyError(RestuneError, LookupError):
    """A tuner family is not registered; the package that provides it is not installed."""


class TunerFileError(RestuneError):
    """A tuner file cannot be read, written or trusted."""


class BaseMismatchError(RestuneError):
    """A tuner was trained for a base of a different structure."""


class TunerNameError(RestuneError, ValueError):
    """A tuner name is unknown, taken, or not allowed."""


class ConditionError(RestuneError, ValueError):
    """A condition image is missing or invalid."""


class SettingsError(RestuneError, ValueError):
    """A setting is unknown, or its value is not allowed."""


class UsageError(RestuneError):
    """A command line is malformed."""


class DataError(RestuneError):
    """Training images or captions cannot be used."""


class NoImageError(DataError):
    """No training image can be read."""


class TrainingError(RestuneError):
    """Training cannot continue."""


class TrainingInterrupted(RestuneError):
    """Training was stopped on request after saving its state; not a failure.

    Attributes:
        by_ctrl_c: whether the request was a Ctrl-C, and not a signal to end, such as that of a scheduler.
    """

    def __init__(self, message: str, *, by_ctrl_c: bool = False) -> None:
        super().__init__(message)
        self.by_ctrl_c = by_ctrl_c
