"""Bodies that clients of A1111 send with their default settings: every field of the API is there."""

from __future__ import annotations

from typing import Any

ALL_FIELDS: dict[str, Any] = {
    "prompt": "a red apple", "negative_prompt": "", "styles": [], "seed": 5, "subseed": -1, "subseed_strength": 0,
    "seed_resize_from_h": -1, "seed_resize_from_w": -1, "sampler_name": "", "scheduler": "Automatic", "batch_size": 1,
    "n_iter": 1, "steps": 2, "cfg_scale": 4, "width": 64, "height": 64, "restore_faces": False, "tiling": False,
    "do_not_save_samples": False, "do_not_save_grid": False, "eta": 0, "denoising_strength": 0, "s_min_uncond": 0,
    "s_churn": 0, "s_tmax": 0, "s_tmin": 0, "s_noise": 1, "override_settings": {},
    "override_settings_restore_afterwards": True, "refiner_checkpoint": "", "refiner_switch_at": 0,
    "disable_extra_networks": False, "firstpass_image": "", "comments": {}, "enable_hr": False, "firstphase_width": 0,
    "firstphase_height": 0, "hr_scale": 2, "hr_upscaler": "", "hr_second_pass_steps": 0, "hr_resize_x": 0,
    "hr_resize_y": 0, "hr_checkpoint_name": "", "hr_sampler_name": "", "hr_scheduler": "", "hr_prompt": "",
    "hr_negative_prompt": "", "force_task_id": "", "sampler_index": "Euler", "script_name": "", "script_args": [],
    "send_images": True, "save_images": False, "alwayson_scripts": {}, "infotext": "",
}  # fmt: skip
"""Every field with the default of A1111's documentation, and empty texts."""

NULL_FIELDS: dict[str, Any] = {
    **dict.fromkeys(ALL_FIELDS),
    **{name: ALL_FIELDS[name] for name in ("prompt", "seed", "steps", "cfg_scale", "width", "height")},
    "sampler_index": "Euler",
}
"""Null for everything that a user need not set."""

CHAT: dict[str, Any] = {
    "prompt": "a red apple", "negative_prompt": "", "sampler_name": "Euler", "scheduler": "Automatic", "steps": 2,
    "cfg_scale": 4, "width": 64, "height": 64, "restore_faces": False, "enable_hr": False, "hr_upscaler": "Latent",
    "hr_scale": 1, "hr_additional_modules": [], "denoising_strength": 0.7, "hr_second_pass_steps": 0, "seed": "5",
    "override_settings": {"CLIP_stop_at_last_layers": 1, "sd_vae": "", "forge_additional_modules": []},
    "override_settings_restore_afterwards": True, "clip_skip": 1, "save_images": True, "send_images": True,
    "do_not_save_grid": False, "do_not_save_samples": False,
}  # fmt: skip
"""Chat front end: saves every image on the server, and names VAE and clip skip."""

EXTENSIONS: dict[str, Any] = {
    **ALL_FIELDS,
    "sampler_name": "k_euler",
    "styles": [""],
    "override_settings": {
        "sd_model_checkpoint": "restune-tiny.safetensors [0123456789]", "enable_pnginfo": True, "samples_save": False,
        "show_progress_type": "Full", "show_progress_every_n_steps": 5,
    },
    "alwayson_scripts": {
        "ADetailer": {"args": [False, False, {"ad_model": "None"}]},
        "ControlNet": {"args": [{"enabled": False, "module": "none"}, {"enabled": False}]},
        "Refiner": {"args": [False, "", 0.8]},
        "Extra options": {"args": []},
    },
}  # fmt: skip
"""Front end with extensions that are switched off, and settings of the user interface."""

PAYLOADS = {"all fields": ALL_FIELDS, "null": NULL_FIELDS, "chat": CHAT, "extensions": EXTENSIONS}
"""Bodies for one image: `a red apple` from seed 5 with Euler, 2 steps and guidance 4."""
