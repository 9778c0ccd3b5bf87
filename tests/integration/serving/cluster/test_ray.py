"""`restune serve --ray`, and the application's replicas, on one small cluster of this machine.

The tests of the application follow one another on its replicas, because each start of a replica takes seconds.
"""

from __future__ import annotations

import base64
import io
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import numpy as np
import openai
import pytest
import torch
import webuiapi
import yaml
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from restune_diffusion.serving.cluster.app import NAME, ClusterSettings, application
from restune_diffusion.serving.cluster.ranking import REPORT_SECONDS
from restune_diffusion.serving.cluster.run import write_ray_config
from restune_diffusion.serving.http.gate import key_digest
from restune_diffusion.serving.http.starting import ServerSettings

from ....conftest import ROOT, TINY_BASE
from ....fragile_replica import FragileReplica
from ....serving_process import ServerProcess, unused_port, wait_for

ray = pytest.importorskip("ray")
KEY = "key-of-the-test"
BROKEN = "The replicas ended while they worked on the request; send it again."
PATIENCE = 420
"""Seconds for the start of replicas on a busy machine; a quiet one takes a tenth."""
# Short delays; the sizes are those of the tiny base.
QUICK = {
    "target_ongoing_requests": 2,
    "upscale_seconds": 0.1,
    "downscale_seconds": 0.5,
    "lookback_seconds": 1.0,
    "health_seconds": 0.5,
    "grace_seconds": 30,
}


@pytest.fixture(scope="module")
def cluster():
    """Address of a cluster without resources to speak of."""
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("OMP_NUM_THREADS", "1")
        # The replicas of the tests are a class of the tests.
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        for kind in ("HANDLE", "REPLICA"):
            patch.setenv(f"RAY_SERVE_{kind}_AUTOSCALING_METRIC_PUSH_INTERVAL_S", "0.3")
        ray.init(
            address="local",
            num_cpus=8,
            object_store_memory=80 << 20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
        )
        yield ray.get_runtime_context().gcs_address
        ray.shutdown()
    for number, handler in signals.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def service(cluster, files):
    """Application with one replica, which grows to two under load."""
    from ray import serve

    service = Service(unused_port(), files)
    serve.start(http_options={"host": "127.0.0.1", "port": service.port})
    started = application(service.settings(), ClusterSettings(max_replicas=2, **QUICK), FragileReplica)
    serve.run(started, name=NAME, route_prefix="/")
    yield service
    serve.shutdown()


class Service:
    """The application under test."""

    def __init__(self, port, files):
        self.port, self.files = port, files
        self.url = f"http://127.0.0.1:{port}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=PATIENCE)

    def settings(self, **changes):
        digest = key_digest(KEY.encode()).hex()
        return ServerSettings(str(TINY_BASE), str(self.files), device="cpu", key_sha256=digest, **changes)

    def generate(self, steps=2, **values):
        """Return the seed of a generated image."""
        extra = {"steps": steps, **{name: values.pop(name) for name in ("seed",) if name in values}}
        return self.client.images.generate(prompt="a fox", extra_body=extra, **values).data[0].seed

    def replicas(self):
        """Return the numbers of replicas by state; none while the application is being deployed."""
        from ray import serve

        app = serve.status().applications[NAME]
        return dict(app.deployments["Engine"].replica_states) if app.status == "RUNNING" else {}

    def metric(self, name):
        """Return the values of a metric by replica."""
        text = httpx.get(f"{self.url}/metrics", headers={"authorization": f"Bearer {KEY}"}, timeout=PATIENCE).text
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        return {sample.labels["replica"]: sample.value for sample in samples if sample.name == name}

    @contextmanager
    def traffic(self, clients, pause, **values):
        """Send requests, each client one after the other, and yield the seeds of their images; none may fail."""
        ended, done = threading.Event(), []

        def work():
            while not ended.wait(pause):
                done.append(self.generate(**values))

        with ThreadPoolExecutor(clients) as pool:
            workers = [pool.submit(work) for _ in range(clients)]
            try:
                yield done
            finally:
                ended.set()
        for worker in workers:
            worker.result()


def test_the_command_serves_on_a_cluster_and_leaves_it(cluster, files, pipe):
    env = {"RESTUNE_API_KEY": KEY, "RAY_ADDRESS": cluster}
    with ServerProcess("--tuners", str(files), "--ray", env=env, free_port=True) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=PATIENCE)
        settings = {"steps": 2, "guidance": 4.0, "seed": 5}
        answer = client.images.generate(prompt="a red apple", extra_body=settings)
        generator = torch.Generator().manual_seed(5)
        expected = pipe("a red apple", num_inference_steps=2, guidance_scale=4.0, generator=generator).images[0]
        image = Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json)))
        assert np.abs(np.asarray(image, int) - np.asarray(expected, int)).max() <= 1
        with pytest.raises(openai.NotFoundError, match="The model `nobody` does not exist"):
            client.images.generate(prompt="a", model="nobody")
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()
        events = list(client.images.generate(prompt="a", stream=True, partial_images=1, extra_body=settings))
        assert [event.type.rpartition(".")[2] for event in events] == ["partial_image", "completed"]
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(PATIENCE) == 0, server.output
    wait_for(lambda: not [name for name in ray.util.list_named_actors(all_namespaces=True) if "Engine" in str(name)])


def test_load_starts_a_second_replica_and_silence_stops_it(service):
    assert service.replicas() == {"RUNNING": 1}
    with service.traffic(clients=6, pause=0, steps=10) as done:
        wait_for(lambda: service.replicas().get("RUNNING") == 2, PATIENCE)
        # The second one gets requests too.
        wait_for(lambda: sorted(count > 0 for count in service.metric("restune_images_total").values()) == [True] * 2)
    assert len(done) > 6
    wait_for(lambda: service.replicas() == {"RUNNING": 1}, PATIENCE)
    assert service.generate(seed=3) == 3


def test_a_replica_whose_engine_has_stopped_is_replaced(service):
    from ray import serve

    (before,) = service.metric("restune_images_total")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(service.generate, steps=150)
        wait_for(lambda: service.metric("restune_running_images")[before] == 1)
        serve.get_deployment_handle("Engine", NAME).end_engine.remote().result(timeout_s=PATIENCE)
        with pytest.raises(openai.InternalServerError, match=BROKEN) as error:
            running.result(PATIENCE)
    assert error.value.status_code == 503
    assert httpx.get(f"{service.url}/readyz").status_code == 503
    wait_for(lambda: httpx.get(f"{service.url}/readyz").status_code == 200, PATIENCE)
    assert service.generate(seed=4) == 4
    assert before not in service.metric("restune_images_total")


def test_a_changed_file_is_deployed_under_traffic_without_a_failed_request(service, tmp_path):
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    path = tmp_path / "serve.yaml"
    with pytest.raises(openai.NotFoundError):
        service.generate(model="later")
    service.generate(steps=101)
    write_ray_config(
        path,
        service.settings(max_steps=100),
        ClusterSettings(min_replicas=2, max_replicas=2, **QUICK),
        "127.0.0.1",
        service.port,
    )
    with service.traffic(clients=3, pause=0.1) as done:
        # What `serve deploy` sends to the dashboard, which does this with it.
        _get_global_client().deploy_apps(ServeDeploySchema.model_validate(yaml.safe_load(path.read_text())))
        wait_for(lambda: service.replicas() == {"RUNNING": 2}, PATIENCE)
        wait_for(lambda: len(service.metric("restune_images_total")) == 2)
        before = len(done)
        wait_for(lambda: len(done) > before + 6)
    with pytest.raises(openai.BadRequestError, match="this server allows 100"):
        service.generate(steps=101)


def test_requests_of_a_tuner_go_to_the_replica_that_holds_it(service):
    with ThreadPoolExecutor(2) as pool:
        # Two that arrive together, and others after them.
        list(pool.map(lambda seed: service.generate(model="water", seed=seed), range(2)))
    for _ in range(3):
        service.generate(model="ink")
        service.generate(model="water")
    assert sorted(service.metric("restune_attached_tuners").values()) == [1, 1]
    assert sum(service.metric("restune_tuner_cache_misses_total").values()) == 2
    # The router knows it now from the reports of the replicas alone.
    time.sleep(REPORT_SECONDS)
    for _ in range(3):
        service.generate(model="ink")
        service.generate(model="water")
    assert sorted(service.metric("restune_attached_tuners").values()) == [1, 1]
    # A replica with too many requests shares them.
    with ThreadPoolExecutor(10) as pool:
        list(pool.map(lambda seed: service.generate(model="water", seed=seed, steps=8), range(10)))
    assert sorted(service.metric("restune_attached_tuners").values()) == [1, 2]


def test_options_of_a1111_are_those_of_all_replicas(service):
    webui = webuiapi.WebUIApi("127.0.0.1", service.port, username="any", password=KEY)
    webui.set_options({"live_previews_enable": True})
    assert {webui.get_options()["live_previews_enable"] for _ in range(6)} == {True}


def test_a_killed_replica_loses_no_request_and_its_stream_ends_with_an_error(service):
    stream = service.client.images.generate(
        prompt="a fox", stream=True, partial_images=3, size="256x256", extra_body={"steps": 100}
    )
    assert next(stream).type == "image_generation.partial_image"
    (replica,) = [name for name, count in service.metric("restune_running_images").items() if count]
    with ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(service.generate, steps=20, seed=seed) for seed in range(12)]
        wait_for(lambda: min(service.metric("restune_running_images").values()) > 0)
        ray.kill(ray.get_actor(f"SERVE_REPLICA::{NAME}#Engine#{replica}", namespace="serve"))
        with pytest.raises(openai.APIError, match=BROKEN):
            list(stream)
        assert [answer.result(PATIENCE) for answer in answers] == list(range(12))
    assert replica not in service.metric("restune_images_total")
