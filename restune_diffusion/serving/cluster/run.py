"""Run the HTTP API on a Ray cluster until the process is asked to end."""

from __future__ import annotations

import os
import signal
import socket
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...utils.atomic_write import atomic_write
from ...utils.errors import RestuneError
from ..http.starting import ServerSettings
from .app import NAME, ClusterSettings, application, ray_config

_ADDRESS = "RAY_ADDRESS"
_CONNECT_SECONDS = 5.0


def check_ray() -> None:
    """Check Ray before the libraries are imported.

    Raises:
        RestuneError: if Ray Serve is not installed, or the cluster of RAY_ADDRESS does not answer.
    """
    if find_spec("ray") is None:
        raise RestuneError("--ray needs Ray Serve; run pip install 'restune-diffusion[serve-ray]'.")
    address = os.environ.get(_ADDRESS, "")
    host, _, port = address.rpartition(":")
    if port.isdigit() and "/" not in host:
        try:
            # Ray itself tries for minutes.
            socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise _no_cluster(address) from error


def run_on_ray(server: ServerSettings, cluster: ClusterSettings, host: str, port: int) -> None:
    """Serve on the cluster that RAY_ADDRESS names, or on one that is started on this machine.

    Args:
        server: settings of each replica's server.
        cluster: settings of the replicas.
        host: address to listen on.
        port: port to listen on.
    """
    import ray
    from ray import serve

    ended = threading.Event()

    def end(*_: Any) -> None:
        ended.set()

    if not ray.is_initialized():
        try:
            ray.init(log_to_driver=False, logging_level="warning")
        except ConnectionError as error:
            raise _no_cluster(os.environ.get(_ADDRESS, "")) from error
    serve.start(http_options={"host": host, "port": port})
    try:
        _deploy(server, cluster)
        # Ray has set handlers of its own, which end the process at once.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, end)
        print(f"Serving {Path(server.base).name} at http://{host}:{port} on Ray", flush=True)
        ended.wait()
    finally:
        serve.delete(NAME)
        # The cluster may serve other applications.
        if not serve.status().applications:
            serve.shutdown()
        ray.shutdown()


def _no_cluster(address: str) -> RestuneError:
    return RestuneError(
        f"No Ray cluster answers at {address}; correct {_ADDRESS}, or unset it to start a cluster on this machine."
    )


def _deploy(server: ServerSettings, cluster: ClusterSettings) -> None:
    from ray import serve

    try:
        serve.run(application(server, cluster), name=NAME, route_prefix="/")
    except RuntimeError as error:
        raise RestuneError(
            f"The application did not start on Ray ({str(error).strip().splitlines()[0]}); the logs of the replicas "
            "have the reason."
        ) from error


def write_ray_config(path: Path, server: ServerSettings, cluster: ClusterSettings, host: str, port: int) -> None:
    """Write the config file for `serve deploy`.

    Args:
        path: the file.
        server: settings of each replica's server.
        cluster: settings of the replicas.
        host: address to listen on.
        port: port to listen on.
    """
    import yaml

    content = yaml.safe_dump(ray_config(server, cluster, host, port), sort_keys=False)
    with atomic_write(path) as file:
        file.write(content.encode())
