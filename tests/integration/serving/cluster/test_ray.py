"""`restune serve --ray` with two replicas on a cluster of this machine."""

from __future__ import annotations

import asyncio
import base64
import io
import signal
import threading
from types import SimpleNamespace

import numpy as np
import openai
import psutil
import pytest
import torch
import webuiapi
from PIL import Image

from ....serving_process import ServerProcess, wait_for

pytest.importorskip("ray")
KEY = "key-of-the-test"
SETTINGS = {"steps": 2, "guidance": 4.0}


def replicas(server) -> list[psutil.Process]:
    """Processes of the engine's replicas."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        title = " ".join(process.info["cmdline"] or [])
        if "ServeReplica:restune:Engine" in title and process.status() != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def test_the_router_prefers_replicas_that_have_used_the_tuners():
    from restune_diffusion.serving.cluster.router import TunerRouter

    stats = {"a": {"tuners": ["ink"]}, "b": {}, "c": {"tuners": ["ink", "water"]}, "d": {"tuners": ["water"]}}
    replicas = [SimpleNamespace(name=name, routing_stats=each) for name, each in stats.items()]
    router = object.__new__(TunerRouter)

    def ranks(*tuners):
        pending = SimpleNamespace(kwargs={"tuners": list(tuners)})
        chosen = asyncio.run(router.choose_replicas(replicas, pending))
        return [sorted(replica.name for replica in rank) for rank in chosen]

    assert ranks("ink", "water") == [["c"], ["a", "d"], ["b"]]
    assert ranks("ink") == [["a", "c"], ["b", "d"]]
    assert [len(rank) for rank in ranks()] == [2]


def test_two_replicas_share_requests_and_one_may_die(files, pipe):
    arguments = ["--tuners", str(files), "--ray", "--min-replicas", "2"]
    env = {"RESTUNE_API_KEY": KEY, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    with ServerProcess(*arguments, env=env, free_port=True) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=300)
        answer = client.images.generate(prompt="a red apple", extra_body=SETTINGS | {"seed": 5})
        generator = torch.Generator().manual_seed(5)
        expected = pipe("a red apple", num_inference_steps=2, guidance_scale=4.0, generator=generator).images[0]
        image = Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json)))
        assert np.abs(np.asarray(image, int) - np.asarray(expected, int)).max() <= 1
        with pytest.raises(openai.NotFoundError, match="The model `nobody` does not exist"):
            client.images.generate(prompt="a", model="nobody")
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()
        events = list(client.images.generate(prompt="a", stream=True, partial_images=1, extra_body=SETTINGS))
        assert [event.type.rpartition(".")[2] for event in events] == ["partial_image", "completed"]
        webui = webuiapi.WebUIApi("127.0.0.1", server.port, username="any", password=KEY)
        # All replicas take an option, whichever answers.
        webui.set_options({"live_previews_enable": True})
        assert {webui.get_options()["live_previews_enable"] for _ in range(6)} == {True}

        processes = replicas(server)
        assert len(processes) == 2
        seconds = {process.pid: sum(process.cpu_times()[:2]) for process in processes}
        answers = []
        threads = [
            threading.Thread(
                target=lambda seed: answers.append(
                    client.images.generate(prompt="a fox", extra_body={"steps": 30, "seed": seed}).data[0].seed
                ),
                args=(seed,),
            )
            for seed in range(6)
        ]
        for thread in threads:
            thread.start()
        # Both work before one is killed.
        wait_for(lambda: all(sum(each.cpu_times()[:2]) > seconds[each.pid] + 0.3 for each in processes), 120)
        processes[0].kill()
        for thread in threads:
            thread.join(300)
        assert sorted(answers) == list(range(6))
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(120) == 0, server.output
        wait_for(lambda: not replicas(server))
