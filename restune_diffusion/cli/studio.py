"""`restune studio`: options, and the process that serves the page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import BaseModel, ConfigDict, Field

from ..serving.http.server import bound_socket
from ..storage.base_files.check import check_base
from ..storage.base_files.location import BUNDLED_BASE
from ..utils.errors import DataError, RestuneError, UsageError
from .options.early_checks import check_device, check_writable
from .options.secret import secret_of_server
from .queue.options import restune_home

PASSWORD_VARIABLE = "RESTUNE_PASSWORD"
_SHORTEST_PASSWORD = 8
_MISSING_EXTRA = "The studio needs {package}; run pip install 'restune-diffusion[studio]'."


class StudioOptions(BaseModel):
    """Open a web page to train, generate, and manage tuners.

    The page is for this machine only, unless --host is given. It then needs a password.

    Example: restune studio

    Example: RESTUNE_PASSWORD=... restune studio ./studio --base ./stable-diffusion-v1-5 --host 0.0.0.0
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    home: Annotated[Path | None, tyro.conf.Positional] = None
    """Folder for tuners, runs, uploaded images and the queue; RESTUNE_HOME or ~/restune if not given."""
    base: str | None = None
    """Stable Diffusion 1.x, 2.x or XL to begin with: a folder in diffusers' format, one safetensors file, or a hub
    repository id; the bundled small base if not given."""
    vae: str | None = None
    """Autoencoder (VAE) instead of the base's own: a folder of an AutoencoderKL, a safetensors file, or a hub
    repository id."""
    data_folders: tuple[Path, ...] = ()
    """Folders of images that the page may read, and write captions to."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every network of this machine."""
    port: int = Field(default=7860, ge=0, le=65535)
    """Port to listen on; 0 chooses a free one."""
    password: str | None = None
    """Password of the page. The variable RESTUNE_PASSWORD keeps it out of the list of processes."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Compute device; `auto` uses a GPU if there is one."""
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Precision of generation; `auto` is fp16 on a GPU and fp32 on the CPU."""
    max_upload_mib: int = Field(default=512, ge=1)
    """Size of an uploaded file in MiB."""

    def run(self) -> None:
        """Serve the page until the process is asked to end."""
        password = self.password_of_page()
        base = str(BUNDLED_BASE) if self.base is None else self.base
        home = self.home or restune_home()
        _check_extra()
        check_base(base, self.vae)
        check_device(self.device)
        check_writable(home)
        for folder in self.data_folders:
            if not folder.is_dir():
                raise DataError(f"The data folder {folder} does not exist; give the path of a folder of images.")
        with bound_socket(self.host, self.port) as bound:
            from .quiet import quiet_libraries

            quiet_libraries()  # before the imports below, which emit warnings
            from ..serving.http.gate import key_digest
            from ..serving.http.server import address_of, run_server
            from ..studio.app import build_app
            from ..studio.context import StudioContext, StudioSettings
            from .train import read_train_command

            settings = StudioSettings(
                home=home.resolve(),
                base=str(Path(base).resolve()) if Path(base).exists() else base,
                vae=self.vae,
                device=self.device,
                dtype=self.dtype,
                data_folders=tuple(folder.resolve() for folder in self.data_folders),
                password_digest=None if password is None else key_digest(password.encode()),
                max_upload_mib=self.max_upload_mib,
                read_command=read_train_command,
            )
            run_server(
                build_app(StudioContext(settings)),
                bound,
                drain=lambda: None,
                grace_seconds=3,
                on_start=lambda: print(f"The studio is open at {address_of(bound)}", flush=True),
                lifespan="on",
            )
        print("The studio has ended. Runs that were started go on.", flush=True)

    def password_of_page(self) -> str | None:
        """Return the password.

        Raises:
            UsageError: if there is none although other machines reach the page, or it is too short.
        """
        password = secret_of_server(
            self.password, PASSWORD_VARIABLE, self.host, option="--password", what="a password"
        )
        if password is None:
            return None
        if len(password) < _SHORTEST_PASSWORD:
            raise UsageError(f"The password must have at least {_SHORTEST_PASSWORD} characters; choose a longer one.")
        return password


def _check_extra() -> None:
    """Raise `RestuneError` if a package of the extra `studio` is missing."""
    from importlib.util import find_spec

    for package in ("gradio", "fastapi", "uvicorn"):
        if find_spec(package) is None:
            raise RestuneError(_MISSING_EXTRA.format(package=package))
