"""Run the HTTP API in this process: socket, signals and graceful shutdown."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket
from collections.abc import Callable, Iterator
from typing import Any, Literal

from ...utils.errors import RestuneError

MISSING_EXTRA = "The server needs {package}; run pip install 'restune-diffusion[serve]'."
_BACKLOG = 2048


def check_serve_extra() -> None:
    """Raise `RestuneError` if a package of the extra `serve` is missing."""
    from importlib.util import find_spec

    for module, package in {
        "fastapi": "fastapi",
        "uvicorn": "uvicorn",
        "python_multipart": "python-multipart",
        "prometheus_client": "prometheus-client",
    }.items():
        if find_spec(module) is None:
            raise RestuneError(MISSING_EXTRA.format(package=package))


def is_loopback(host: str) -> bool:
    """Return whether only programs of this machine reach a host address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bound_socket(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address.

    Raises:
        RestuneError: if the port is in use, or the address is not one of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise RestuneError(f"The host {host} is not an address; use for example --host 127.0.0.1.") from error
    try:
        # A port whose connections have just been closed can be used at once.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        # A second server on this port is refused from here on, before the base is loaded.
        bound.listen(_BACKLOG)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            raise RestuneError(
                f"Port {port} of {host} is in use by another program; choose another one with --port."
            ) from error
        raise RestuneError(f"Cannot listen on port {port} of {host}: {error.strerror}.") from error
    return bound


def address_of(bound: socket.socket) -> str:
    """Return the URL of a bound socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run_server(
    app: Any,
    bound: socket.socket,
    *,
    drain: Callable[[], None],
    grace_seconds: int,
    on_start: Callable[[], None],
    lifespan: Literal["on", "off"] = "off",
) -> None:
    """Answer requests until the process is asked to end by Ctrl-C or SIGTERM.

    Args:
        app: the ASGI application.
        bound: the socket.
        drain: called first when the server ends; makes the application refuse new requests.
        grace_seconds: longest time to finish requests after that.
        on_start: called when the server answers.
        lifespan: whether the application has tasks of its own at start and end.
    """
    import uvicorn

    class Server(uvicorn.Server):
        """Server that refuses new requests once it is asked to end, and then returns."""

        def handle_exit(self, sig: int, frame: Any) -> None:
            drain()
            super().handle_exit(sig, frame)

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            on_start()

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            with super().capture_signals():
                yield
                # uvicorn would raise the signal again, which ends the process before the engine is closed.
                self._captured_signals.clear()

    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan=lifespan,
        ws="none",
        loop="asyncio",
        http="h11",
        timeout_graceful_shutdown=grace_seconds,
        proxy_headers=False,
    )
    Server(config).run(sockets=[bound])
