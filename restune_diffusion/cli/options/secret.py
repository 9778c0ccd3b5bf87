"""Secrets of a server: a password or a key, from an option or from the environment."""

from __future__ import annotations

import os

from ...serving.http.server import is_loopback
from ...utils.errors import UsageError


def secret_of_server(given: str | None, variable: str, host: str, *, option: str, what: str) -> str | None:
    """Return a secret, or None for a server that only this machine reaches.

    Args:
        given: value of the option, or None.
        variable: environment variable that is read if the option is not given; an empty one counts as not set.
        host: address that the server listens on.
        option: name of the option.
        what: the secret with its article, for the message.

    Raises:
        UsageError: if there is none although other machines reach the server.
    """
    secret = (os.environ.get(variable) or None) if given is None else given
    if secret is None and not is_loopback(host):
        raise UsageError(f"--host {host} lets other machines in, which needs {what}; set {variable} or give {option}.")
    return secret
