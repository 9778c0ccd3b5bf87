"""Errors of a request to the engine; each message is one sentence with the problem and the remedy."""

from ..utils.errors import RestuneError


class RequestRefused(RestuneError, ValueError):
    """A request is invalid, or larger than the engine's limits; the same request is refused again."""


class QueueFull(RestuneError):
    """The engine has no room for another request; the same request may be accepted later."""


class RequestFailed(RestuneError):
    """An accepted request has failed, for example because its latents became NaN."""


class RequestCancelled(RestuneError):
    """An accepted request was cancelled, or the engine was closed before it was done."""


class EngineStopped(RestuneError):
    """The thread of the engine has ended by an error, so it computes no request any more."""

    def __init__(self) -> None:
        super().__init__("The engine has stopped after an error; its log has the reason, and a restart is needed.")
