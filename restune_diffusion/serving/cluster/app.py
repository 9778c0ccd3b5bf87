"""Ray Serve application: an ingress and replicas of the engine, for `serve.run` and for `serve deploy`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..http.starting import ServerSettings

NAME = "restune"
IMPORT_PATH = "restune_diffusion.serving.cluster.app:build"
_STATS_SECONDS = 1


@dataclass(frozen=True)
class ClusterSettings:
    """Settings of the replicas."""

    min_replicas: int = 1
    max_replicas: int = 1
    target_ongoing_requests: int = 8
    """Requests of a replica above which another one is started; also how many requests more than others a replica may
    have because it holds their tuners."""
    upscale_seconds: float = 10.0
    """Time above the target before a replica is started."""
    downscale_seconds: float = 300.0
    """Time below the target before a replica is stopped."""
    lookback_seconds: float = 30.0
    """Time over which the requests of a replica are averaged."""
    health_seconds: float = 10.0
    """Time between two checks of a replica's engine; three failed ones replace the replica."""
    surge_percent: int = 0
    """Additional replicas during a redeployment, in percent; they need free GPUs and CPUs. With 0, each replica is
    stopped before its successor starts."""
    gpus: float = 0.0
    """GPUs of a replica."""
    cpus: float = 1.0
    """CPUs of a replica."""
    grace_seconds: int = 60
    """Time in which a replica that is stopped may finish its requests."""


def build(args: dict[str, Any]) -> Any:
    """Return the application of a config file.

    Args:
        args: `server` with fields of `ServerSettings`, and `cluster` with fields of `ClusterSettings`.
    """
    return application(ServerSettings(**args["server"]), ClusterSettings(**args.get("cluster", {})))


def application(server: ServerSettings, cluster: ClusterSettings, replica_class: type | None = None) -> Any:
    """Return the application.

    Args:
        server: settings of each replica's server.
        cluster: settings of the replicas.
        replica_class: class of the replicas; `EngineReplica` if not given, otherwise a class derived from it.
    """
    from ray import serve
    from ray.serve.config import AutoscalingConfig, RequestRouterConfig

    from .ingress import Ingress
    from .replica import EngineReplica
    from .router import TunerRouter

    most = server.max_queue + server.max_rows
    replica = serve.deployment(
        replica_class or EngineReplica,
        name="Engine",
        max_ongoing_requests=most,
        autoscaling_config=AutoscalingConfig(
            min_replicas=cluster.min_replicas,
            max_replicas=cluster.max_replicas,
            target_ongoing_requests=cluster.target_ongoing_requests,
            upscale_delay_s=cluster.upscale_seconds,
            downscale_delay_s=cluster.downscale_seconds,
            look_back_period_s=cluster.lookback_seconds,
        ),
        ray_actor_options={"num_cpus": cluster.cpus, "num_gpus": cluster.gpus},
        health_check_period_s=cluster.health_seconds,
        max_surge_percent=cluster.surge_percent,
        graceful_shutdown_timeout_s=cluster.grace_seconds,
        request_router_config=RequestRouterConfig(
            request_router_class=TunerRouter,
            request_router_kwargs={"advantage": float(cluster.target_ongoing_requests)},
            request_routing_stats_period_s=_STATS_SECONDS,
        ),
    )
    ingress = serve.deployment(
        Ingress,
        name="Ingress",
        max_ongoing_requests=most * cluster.max_replicas,
        ray_actor_options={"num_cpus": 0},
        # An ingress needs no resources, so the new one always starts before the old one is stopped.
        max_surge_percent=100,
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
