"""Ray Serve application: an ingress and replicas of the engine, for `serve.run` and for `serve deploy`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..http.starting import ServerSettings

NAME = "restune"
IMPORT_PATH = "restune_diffusion.serving.cluster.app:build"
_HEALTH_SECONDS = 10
_STATS_SECONDS = 1


@dataclass(frozen=True)
class ClusterSettings:
    """Settings of the replicas."""

    min_replicas: int = 1
    max_replicas: int = 1
    target_ongoing_requests: int = 8
    """Requests of a replica above which another one is started."""
    upscale_seconds: float = 10.0
    """Time above the target before a replica is started."""
    downscale_seconds: float = 300.0
    """Time below the target before a replica is stopped."""
    gpus: float = 0.0
    """GPUs of a replica."""
    cpus: float = 1.0
    """CPUs of a replica."""
    grace_seconds: int = 60
    """Time in which a replica that is stopped may finish its requests."""


def build(args: dict[str, Any]) -> Any:
    """Return the application.

    Args:
        args: `server` with fields of `ServerSettings`, and `cluster` with fields of `ClusterSettings`.
    """
    from ray import serve
    from ray.serve.config import AutoscalingConfig, RequestRouterConfig

    from .ingress import Ingress
    from .replica import EngineReplica
    from .router import TunerRouter

    server, cluster = ServerSettings(**args["server"]), ClusterSettings(**args.get("cluster", {}))
    most = server.max_queue + server.max_rows
    replica = serve.deployment(
        EngineReplica,
        name="Engine",
        max_ongoing_requests=most,
        autoscaling_config=AutoscalingConfig(
            min_replicas=cluster.min_replicas,
            max_replicas=cluster.max_replicas,
            target_ongoing_requests=cluster.target_ongoing_requests,
            upscale_delay_s=cluster.upscale_seconds,
            downscale_delay_s=cluster.downscale_seconds,
        ),
        ray_actor_options={"num_cpus": cluster.cpus, "num_gpus": cluster.gpus},
        health_check_period_s=_HEALTH_SECONDS,
        graceful_shutdown_timeout_s=cluster.grace_seconds,
        request_router_config=RequestRouterConfig(
            request_router_class=TunerRouter, request_routing_stats_period_s=_STATS_SECONDS
        ),
    )
    ingress = serve.deployment(
        Ingress,
        name="Ingress",
        max_ongoing_requests=most * cluster.max_replicas,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=cluster.grace_seconds,
    )
    return ingress.bind(asdict(server), replica.bind(asdict(server)))


def ray_config(server: ServerSettings, cluster: ClusterSettings, host: str, port: int) -> dict[str, Any]:
    """Return the content of a config file for `serve deploy`.

    Args:
        server: settings of each replica's server.
        cluster: settings of the replicas.
        host: address to listen on.
        port: port to listen on.
    """
    application = {
        "name": NAME,
        "route_prefix": "/",
        "import_path": IMPORT_PATH,
        "args": {"server": asdict(server), "cluster": asdict(cluster)},
    }
    return {"http_options": {"host": host, "port": port}, "applications": [application]}
