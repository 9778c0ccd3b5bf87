"""A1111's options, and refusal of functions that this server does not have."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from typing import Any

from ..bodies import Txt2ImgBody
from ..errors import RequestError
from ..service import Service

_PREVIEWS, _EVERY, _MODEL, _CLIP = (
    "live_previews_enable",
    "show_progress_every_n_steps",
    "sd_model_checkpoint",
    "CLIP_stop_at_last_layers",
)
_CHECKPOINT_END = re.compile(r"(\.safetensors|\.ckpt)?( \[[0-9a-f]{6,64}\])?$")
# Options of A1111 whose only value here changes nothing.
_FIXED: Mapping[str, tuple[Any, ...]] = {
    _CLIP: (1,),
    "samples_format": ("png",),
    "sd_vae": ("Automatic", "None", "", None),
    "eta_noise_seed_delta": (0,),
    "randn_source": ("CPU",),
    "enable_pnginfo": (True,),
    "forge_additional_modules": ([], None),
}
# Options about files, previews and functions that are refused elsewhere: no value changes an image of this server.
_WITHOUT_EFFECT = frozenset({
    "samples_save", "grid_save", "save_to_dirs", "show_progress_type", "show_progress_grid", "code_former_weight",
    "live_preview_refresh_period", "live_previews_image_format", "face_restoration_model", "upscaler_for_img2img",
    "sd_checkpoint_hash",
})  # fmt: skip


class Options:
    """Options of all A1111 clients: previews can be changed, others have one value."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._lock = threading.Lock()
        self._previews, self._every = False, 10

    @property
    def preview_every(self) -> int:
        """Number of steps between previews; 0 without previews."""
        return self._every if self._previews else 0

    def values(self) -> dict[str, Any]:
        """Return all options."""
        fixed = {name: allowed[0] for name, allowed in _FIXED.items()}
        return {_MODEL: self._service.base.name, _PREVIEWS: self._previews, _EVERY: self._every, **fixed}

    def change(self, values: Mapping[str, Any]) -> None:
        """Change options.

        Raises:
            RequestError: if one is unknown, or its value is not possible; none is changed then.
        """
        check_settings(values, self._service)
        previews, every = values.get(_PREVIEWS, self._previews), values.get(_EVERY, self._every)
        if not isinstance(previews, bool):
            raise RequestError(f"`{_PREVIEWS}` must be true or false.", param=_PREVIEWS)
        if isinstance(every, bool) or not isinstance(every, int) or not 1 <= every <= 1000:
            raise RequestError(f"`{_EVERY}` must be from 1 to 1000.", param=_EVERY)
        with self._lock:
            self._previews, self._every = previews, every


def check_settings(values: Mapping[str, Any], service: Service) -> None:
    """Raise `RequestError` if an option of A1111 is unknown, or has a value that is not possible here."""
    for name, value in values.items():
        if name == _MODEL:
            _check_checkpoint(value, service)
        elif name in _FIXED:
            if value not in _FIXED[name]:
                raise RequestError(f"`{name}` has only the value {_FIXED[name][0]!r} on this server.", param=name)
        elif name not in (_PREVIEWS, _EVERY, *_WITHOUT_EFFECT):
            raise RequestError(f"The option `{name[:80]}` does not exist on this server; leave it out.", param=name)


def _check_checkpoint(value: Any, service: Service) -> None:
    """Raise `RequestError` if a checkpoint is not the base, whose name clients may give with file suffix and hash."""
    known = service.base_names
    if value in (None, "") or (isinstance(value, str) and (value in known or _CHECKPOINT_END.sub("", value) in known)):
        return
    raise RequestError(
        f"The checkpoint `{str(value)[:80]}` does not exist; this server has `{service.base.name}`.", 404
    )


def refuse_missing_functions(body: Txt2ImgBody, service: Service) -> None:
    """Raise `RequestError` if a request asks for a function of A1111 that this server does not have."""
    wanted = {
        "enable_hr": body.enable_hr,
        "restore_faces": body.restore_faces,
        "tiling": body.tiling,
        "subseed_strength": body.subseed_strength,
        "seed_resize_from_w": (body.seed_resize_from_w or 0) > 0,
        "seed_resize_from_h": (body.seed_resize_from_h or 0) > 0,
        "refiner_checkpoint": body.refiner_checkpoint not in (None, "", "None"),
        "infotext": body.infotext,
        "styles": any(body.styles or ()),
        "script_name": body.script_name,
        # With the images in the response, the client gets what it waits for.
        "save_images": body.save_images and not body.send_images,
        "alwayson_scripts": any(map(_is_used, (body.alwayson_scripts or {}).values())),
    }
    for name, value in wanted.items():
        if value:
            raise RequestError(f"`{name}` is not supported by this server; leave it out.", param=name)
    check_settings(body.override_settings or {}, service)


def _is_used(script: Any) -> bool:
    """Return whether the arguments of a script turn it on.

    The switch is the first argument, as of ADetailer, or `enabled` of each unit, as of ControlNet.
    """
    arguments = script.get("args") if isinstance(script, Mapping) else script
    if not arguments:
        return False
    units = arguments if isinstance(arguments, list) else [arguments]
    return units[0] is not False and any(
        not isinstance(unit, Mapping) or unit.get("enabled") is not False for unit in units
    )
