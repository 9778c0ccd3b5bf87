"""Sessions of browsers that gave the password, and the limit on wrong passwords."""

from __future__ import annotations

import hashlib
import ipaddress
import secrets
import time
from collections import OrderedDict, deque
from collections.abc import Callable

_LIFETIME_SECONDS = 7 * 24 * 3600
_MOST_SESSIONS = 1000
_FREE_ATTEMPTS = 5
_LONGEST_WAIT_SECONDS = 300.0
_FORGOTTEN_AFTER_SECONDS = 3600.0
_MOST_CLIENTS = 10_000
_WRONG_PER_SECOND = 10


class Sessions:
    """Open sessions; only digests of their tokens are kept.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ends: OrderedDict[bytes, float] = OrderedDict()

    def open(self) -> str:
        """Open a session and return its token, for a cookie."""
        token = secrets.token_urlsafe(32)
        self._ends[_digest(token)] = self._clock() + _LIFETIME_SECONDS
        while len(self._ends) > _MOST_SESSIONS:
            self._ends.popitem(last=False)
        return token

    def is_open(self, token: str) -> bool:
        """Return whether a token is that of an open session."""
        return self._ends.get(_digest(token), 0.0) > self._clock()

    def close(self, token: str) -> None:
        """End a session."""
        self._ends.pop(_digest(token), None)


class Attempts:
    """Wrong passwords: after five from one address, each further one doubles the wait; all addresses share a rate.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._wrong: OrderedDict[str, tuple[int, float]] = OrderedDict()
        self._latest: deque[float] = deque(maxlen=_WRONG_PER_SECOND)

    def wait(self, client: str) -> float:
        """Return the seconds until a client's next password is looked at; 0 if it is now."""
        now = self._clock()
        count, last = self._wrong.get(_network(client), (0, now))
        own = 0.0
        if count >= _FREE_ATTEMPTS and now - last < _FORGOTTEN_AFTER_SECONDS:
            own = last + min(_LONGEST_WAIT_SECONDS, 2.0 ** min(count - _FREE_ATTEMPTS, 20)) - now
        shared = self._latest[0] + 1.0 - now if len(self._latest) == _WRONG_PER_SECOND else 0.0
        return max(0.0, own, shared)

    def note_wrong(self, client: str) -> None:
        """Count a wrong password."""
        now = self._clock()
        network = _network(client)
        count, last = self._wrong.pop(network, (0, now))
        self._wrong[network] = (count + 1 if now - last < _FORGOTTEN_AFTER_SECONDS else 1, now)
        self._latest.append(now)
        while len(self._wrong) > _MOST_CLIENTS:
            self._wrong.popitem(last=False)

    def note_right(self, client: str) -> None:
        """Forget the wrong passwords of a client that gave the right one."""
        self._wrong.pop(_network(client), None)


def _network(client: str) -> str:
    """Return an address, or for IPv6 its network: a client has as many addresses there as it likes."""
    try:
        address = ipaddress.ip_address(client)
    except ValueError:
        return client
    return str(ipaddress.ip_network((address, 64), strict=False)) if address.version == 6 else client


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "replace")).digest()
