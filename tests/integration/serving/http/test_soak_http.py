"""Mixed traffic of several clients over HTTP while tuner files are added, changed, broken and removed.

RESTUNE_SOAK_SECONDS sets the time, 12 by default. The figures are printed; pytest shows them with `-s`.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import random
import socket
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from restune_diffusion import RestuneStableDiffusionPipeline, SkipConfig, Tuner, save_tuner
from restune_diffusion.pipelines.schedulers import named_scheduler

from ....conftest import randomize
from ....serving_base import library_tuner, write_tuners
from ....serving_process import ServerProcess, wait_for

SECONDS = float(os.environ.get("RESTUNE_SOAK_SECONDS", "12"))
CLIENTS = 4
CHECKED = 6
MOST_GROWTH = 64 * 2**20
STABLE = ("skip", "res", "bypass", "lora", "diffusers", "text")
CHANGING = tuple(f"changing-{number}" for number in range(3))
WEBUI_SAMPLERS = {"Euler": "euler", "DDIM": "ddim", "UniPC": "unipc"}


class Client:
    """A client that sends random requests, one after the other.

    Args:
        port: port of the server.
        seed: seed of its random source.
        stop: set when the client must end.
    """

    def __init__(self, port: int, seed: int, stop: threading.Event) -> None:
        self.port, self.stop, self.chance = port, stop, random.Random(seed)
        self.statuses: Counter[str] = Counter()
        self.kept: list[tuple[dict[str, Any], Image.Image]] = []
        """Requests with stable tuners, and their images."""
        self.wrong: list[Any] = []
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        answered = [self.generation, self.webui]
        kinds = [*answered, *answered, self.stream, self.edit, self.changing, self.refused, self.gone, self.lists]
        while not self.stop.is_set():
            kind = self.chance.choice(kinds)
            try:
                status, right = kind()
            except Exception as error:
                status, right = type(error).__name__, False
                self.wrong.append(str(error))
            self.statuses[f"{kind.__name__} {status}"] += 1
            if not right:
                self.wrong.append((kind.__name__, status))

    def settings(self) -> dict[str, Any]:
        """Random settings, the same for both APIs."""
        chance = self.chance
        return {
            "prompt": chance.choice(["a red apple", "a boat, noto style", "a <dog>"]),
            "seed": chance.randrange(2**31),
            "steps": chance.randrange(2, 5),
            "guidance": chance.choice([1.0, 4.0]),
            "scheduler": chance.choice(list(WEBUI_SAMPLERS.values())),
            "width": chance.choice([64, 96]),
            "tuner": chance.choice(STABLE),
            "weight": chance.choice([0.5, 1.0]),
        }

    def ask(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
        """Send a request, and return status and content of the response."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            if isinstance(body, dict):
                body, headers = json.dumps(body).encode(), {"content-type": "application/json"}
            connection.request("GET" if body is None else "POST", path, body, headers or {})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def openai_body(self, settings: dict[str, Any], **more: Any) -> dict[str, Any]:
        own = {name: settings[name] for name in ("prompt", "seed", "steps", "guidance", "scheduler")}
        model = f"{settings['tuner']}:{settings['weight']}"
        return {**own, "model": model, "size": f"{settings['width']}x64", **more}

    def keep(self, settings: dict[str, Any], encoded: str) -> None:
        image = Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")
        if image.size != (settings["width"], 64):
            self.wrong.append(image.size)
        self.kept.append((settings, image))

    def generation(self) -> tuple[Any, bool]:
        settings = self.settings()
        status, content = self.ask("/v1/images/generations", self.openai_body(settings))
        if status == 200:
            self.keep(settings, json.loads(content)["data"][0]["b64_json"])
        return status, status == 200

    def webui(self) -> tuple[Any, bool]:
        settings = self.settings()
        names = {name: sampler for sampler, name in WEBUI_SAMPLERS.items()}
        body = {
            "prompt": f"{settings['prompt']} <lora:{settings['tuner']}:{settings['weight']}>",
            "seed": settings["seed"], "steps": settings["steps"], "cfg_scale": settings["guidance"],
            "sampler_name": names[settings["scheduler"]], "width": settings["width"], "height": 64,
        }  # fmt: skip
        status, content = self.ask("/sdapi/v1/txt2img", body)
        if status == 200:
            self.keep(settings, json.loads(content)["images"][0])
        return status, status == 200

    def stream(self) -> tuple[Any, bool]:
        body = self.openai_body(self.settings(), stream=True, partial_images=1)
        status, content = self.ask("/v1/images/generations", body)
        return status, status == 200 and b"image_generation.completed" in content

    def edit(self) -> tuple[Any, bool]:
        photo = io.BytesIO()
        Image.effect_noise((64, 64), 60).convert("RGB").save(photo, "PNG")
        body = {
            "prompt": "a house", "init_images": [base64.b64encode(photo.getvalue()).decode()], "steps": 4,
            "denoising_strength": 0.5, "width": 64, "height": 64,
        }  # fmt: skip
        status, _ = self.ask("/sdapi/v1/img2img", body)
        return status, status == 200

    def changing(self) -> tuple[Any, bool]:
        """A tuner whose file may be missing or broken."""
        body = self.openai_body({**self.settings(), "tuner": self.chance.choice(CHANGING)})
        status, _ = self.ask("/v1/images/generations", body)
        return status, status in (200, 400, 404, 422)

    def refused(self) -> tuple[Any, bool]:
        body = self.openai_body(self.settings(), **self.chance.choice([{"steps": 0}, {"model": "../x"}, {"n": "x"}]))
        status, _ = self.ask("/v1/images/generations", body)
        return status, status in (400, 404, 422)

    def gone(self) -> tuple[Any, bool]:
        """A client that does not wait for its answer."""
        body = json.dumps(self.openai_body({**self.settings(), "steps": 30})).encode()
        head = f"POST /v1/images/generations HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n"
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.sendall(head.encode() + b"content-type: application/json\r\n\r\n" + body)
            time.sleep(self.chance.random() * 0.2)
        return "disconnected", True

    def lists(self) -> tuple[Any, bool]:
        status, _ = self.ask(self.chance.choice(["/v1/models", "/sdapi/v1/loras", "/sdapi/v1/progress", "/healthz"]))
        return status, status == 200


def change_a_file(folder: Path, unet: Any, chance: random.Random) -> None:
    """Write, break or remove one of the changing files."""
    path = folder / f"{chance.choice(CHANGING)}.safetensors"
    match chance.choice(["write", "write", "break", "remove"]):
        case "write":
            tuner = Tuner.for_base(unet, SkipConfig(ratio=chance.choice([0.25, 0.5])))
            randomize(tuner, chance.randrange(10**6), std=0.05)
            save_tuner(tuner, path)
        case "break":
            path.write_bytes(chance.randbytes(64))
        case "remove":
            path.unlink(missing_ok=True)


def metric(server: ServerProcess, name: str) -> float:
    text = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    text.request("GET", "/metrics")
    lines = text.getresponse().read().decode().splitlines()
    text.close()
    return next(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))


def by_the_pipeline(pipe: Any, folder: Path, settings: dict[str, Any]) -> Image.Image:
    """Return the image of the same request by a call of the pipeline."""
    own = RestuneStableDiffusionPipeline(
        **{**pipe.components, "scheduler": named_scheduler(settings["scheduler"], pipe.scheduler)},
        requires_safety_checker=False,
    )
    own.set_progress_bar_config(disable=True)
    try:
        own.load_tuner_weights(library_tuner(pipe, folder / f"{settings['tuner']}.safetensors"), "style")
        own.set_tuners("style", settings["weight"])
        return own(
            settings["prompt"],
            num_inference_steps=settings["steps"],
            guidance_scale=settings["guidance"],
            generator=torch.Generator().manual_seed(settings["seed"]),
            width=settings["width"],
            height=64,
        ).images[0]
    finally:
        own.unload_tuner_weights()


@pytest.mark.timeout(SECONDS * 2 + 600)
def test_mixed_traffic_gets_right_answers_and_nothing_stays(pipe, tmp_path):
    folder = tmp_path / "library"
    folder.mkdir()
    write_tuners(pipe, folder)
    with ServerProcess("--tuners", str(folder)) as server:
        process = psutil.Process(server.process.pid)
        stop, chance = threading.Event(), random.Random(0)
        clients = [Client(server.port, seed, stop) for seed in range(CLIENTS)]
        started, memory, files, changes = time.monotonic(), 0, 0, 0
        # Under load from other processes the time may be too short for enough answers.
        while (passed := time.monotonic() - started) < SECONDS or sum(len(each.kept) for each in clients) < CHECKED:
            change_a_file(folder, pipe.unet, chance)
            changes += 1
            if memory == 0 and passed > SECONDS / 3:
                memory, files = server.resident_bytes, process.num_fds()
            time.sleep(0.2)
        stop.set()
        for client in clients:
            client.thread.join()
        assert server.process.poll() is None, (server.process.returncode, server.output)
        wait_for(lambda: metric(server, "restune_running_images") == 0)
        assert metric(server, "restune_queue_length") == 0
        assert metric(server, "restune_decoding_images") == 0
        assert metric(server, "restune_attached_tuners") <= 16
        grown = server.resident_bytes - memory
        assert process.num_fds() <= files + CLIENTS
        statuses = sum((client.statuses for client in clients), Counter())
        kept = [each for client in clients for each in client.kept]
        figures = {"seconds": SECONDS, "requests": statuses.total(), "changes": changes, "statuses": dict(statuses),
                   "MiB after a third": memory / 2**20, "MiB grown": grown / 2**20, "evictions":
                   metric(server, "restune_tuner_cache_evictions_total")}  # fmt: skip
        print(json.dumps(figures, indent=1))
        # A file that is broken between the arrival of a request and its first step.
        broken = sum(count for name, count in statuses.items() if name.startswith("changing 4"))
        assert metric(server, "restune_images_failed_total") <= broken
        assert [each for client in clients for each in client.wrong] == []
        assert "Traceback" not in server.output
        assert grown < MOST_GROWTH
    for settings, image in chance.sample(kept, CHECKED):
        expected = by_the_pipeline(pipe, folder, settings)
        assert np.abs(np.asarray(image, int) - np.asarray(expected, int)).max() <= 1, settings
