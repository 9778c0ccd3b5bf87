"""`restune serve`: options, and the server's process."""

from __future__ import annotations

import socket
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from pydantic import BaseModel, ConfigDict, Field

from ...serving.http.server import bound_socket, check_serve_extra
from ...storage.base_files.check import check_base
from ...storage.base_files.location import BUNDLED_BASE, is_hub_id
from ...utils.errors import DataError, UsageError
from ..options.early_checks import check_device
from ..options.secret import secret_of_server

if TYPE_CHECKING:
    from ...serving.http.starting import ServerSettings

KEY_VARIABLE = "RESTUNE_API_KEY"
_SHORTEST_KEY = 8


class ServeOptions(BaseModel):
    """Serve one base and a folder of tuners over HTTP: OpenAI's Images API and A1111's API.

    The server listens on this machine only, unless --host is given. It then needs an API key.

    Example: restune serve ./stable-diffusion-v1-5 --tuners ./tuners

    Example: RESTUNE_API_KEY=... restune serve ./stable-diffusion-v1-5 --tuners ./tuners --host 0.0.0.0
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    base: Annotated[str | None, tyro.conf.Positional] = None
    """Stable Diffusion 1.x, 2.x or XL: a folder in diffusers' format, one safetensors file, or a hub repository id;
    the bundled small base if not given."""
    tuners: Path | None = None
    """Folder of tuner files and LoRA files; files that are added or changed later are served too."""
    tuner_repos: tuple[str, ...] = ()
    """Tuners on the Hub by repository id, such as `artist/ink`; downloaded at the start, and named by the id."""
    vae: str | None = None
    """Autoencoder (VAE) instead of the base's own: a folder of an AutoencoderKL, a safetensors file, or a hub
    repository id."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every network of this machine."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on; 0 chooses a free one."""
    api_key: str | None = None
    """Key that requests need, as a bearer token or as the password of basic auth. The variable RESTUNE_API_KEY
    keeps it out of the list of processes."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Compute device; `auto` uses a GPU if there is one."""
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Precision; `auto` is fp16 on a GPU and fp32 on the CPU."""
    max_rows: int = Field(default=8, ge=2)
    """Rows of a U-Net call; an image with guidance takes two."""
    max_queue: int = Field(default=64, ge=1)
    """Images that may wait; further requests get status 429."""
    max_side: int = Field(default=2048, ge=8)
    """Longest side of a generated image in pixels."""
    max_images: int = Field(default=16, ge=1)
    """Images of one request."""
    max_steps: int = Field(default=150, ge=1, le=1000)
    """Denoising steps of an image."""
    max_upload_mib: int = Field(default=32, ge=1)
    """Size of a request in MiB."""
    grace_seconds: int = Field(default=60, ge=0)
    """Time to finish requests after SIGTERM or Ctrl-C."""

    ray: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Serve on Ray Serve: several replicas, on the cluster that RAY_ADDRESS names or on one of this machine."""
    min_replicas: int = Field(default=1, ge=1)
    """Replicas on Ray that always run."""
    max_replicas: int = Field(default=1, ge=1)
    """Replicas on Ray under load."""
    gpus_per_replica: float | None = Field(default=None, ge=0)
    """GPUs of a replica on Ray; 1 with --device cuda, otherwise 0."""
    write_ray_config: Path | None = None
    """Write a config file for Ray's `serve deploy`, and do not serve."""

    def run(self) -> None:
        """Serve until the process is asked to end."""
        key = self.key()
        self.check_inputs()
        if self.ray or self.write_ray_config is not None:
            self._use_ray(key)
            return
        with bound_socket(self.host, self.port) as bound:
            self._serve(bound, key)
        print("The server has ended.", flush=True)

    @property
    def base_source(self) -> str:
        """Path or id of the base."""
        return str(BUNDLED_BASE) if self.base is None else self.base

    def key(self) -> str | None:
        """Return the API key.

        Raises:
            UsageError: if there is none although other machines reach the server, or it is too weak.
        """
        key = secret_of_server(self.api_key, KEY_VARIABLE, self.host, option="--api-key", what="an API key")
        if key is None:
            return None
        if len(key) < _SHORTEST_KEY or not key.isascii() or not key.isprintable() or key != key.strip():
            raise UsageError(
                f"The API key must have at least {_SHORTEST_KEY} printable ASCII characters, and no space around them."
            )
        return key

    def check_inputs(self) -> None:
        """Check packages, base, tuner folder and device, before the libraries are imported.

        Raises:
            RestuneError: if one of them is missing.
        """
        check_serve_extra()
        check_base(self.base_source, self.vae)
        if self.tuners is not None and not self.tuners.is_dir():
            raise DataError(f"The tuner folder {self.tuners} does not exist; give the path of a folder.")
        for repository in self.tuner_repos:
            if not is_hub_id(repository):
                raise UsageError(
                    f"--tuner-repos {repository} is not a repository id such as artist/ink; put files on this machine "
                    "into the folder of --tuners."
                )
        check_device(self.device)

    def _serve(self, bound: socket.socket, key: str | None) -> None:
        """Load the base, start the engine, and answer requests on a socket."""
        from ...serving.http.server import address_of, run_server
        from ...serving.http.starting import start_app
        from ..quiet import quiet_libraries

        quiet_libraries()
        app = start_app(self.settings(key))
        try:
            run_server(
                app,
                bound,
                drain=app.drain,
                grace_seconds=self.grace_seconds,
                on_start=lambda: print(f"Serving {app.service.base.name} at {address_of(bound)}", flush=True),
            )
        finally:
            app.service.engine.close()

    def _use_ray(self, key: str | None) -> None:
        """Serve on Ray, or write the config file for it."""
        from ...serving.cluster.app import ClusterSettings
        from ...serving.cluster.run import check_ray, run_on_ray, write_ray_config

        cluster = ClusterSettings(
            min_replicas=self.min_replicas,
            max_replicas=max(self.min_replicas, self.max_replicas),
            gpus=float(self.device == "cuda") if self.gpus_per_replica is None else self.gpus_per_replica,
            grace_seconds=self.grace_seconds,
        )
        if self.write_ray_config is not None:
            write_ray_config(self.write_ray_config, self.settings(key), cluster, self.host, self.port)
            print(self.write_ray_config)
            return
        check_ray()
        bound_socket(self.host, self.port).close()
        run_on_ray(self.settings(key), cluster, self.host, self.port)
        print("The server has ended.", flush=True)

    def settings(self, key: str | None) -> ServerSettings:
        """Return the settings of the server.

        Args:
            key: the API key.
        """
        from ...serving.http.gate import key_digest
        from ...serving.http.starting import ServerSettings

        names = {field.name for field in fields(ServerSettings)} & type(self).model_fields.keys() - {"base", "tuners"}
        return ServerSettings(
            base=str(Path(self.base_source).resolve()) if Path(self.base_source).exists() else self.base_source,
            tuners=None if self.tuners is None else str(self.tuners.resolve()),
            key_sha256=None if key is None else key_digest(key.encode()).hex(),
            **{name: getattr(self, name) for name in names},
        )
