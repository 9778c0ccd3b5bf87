"""Forwarding to replicas that end: which response the client gets."""

from __future__ import annotations

import asyncio
import json

import pytest

ray_errors = pytest.importorskip("ray.exceptions")

from restune_diffusion.serving.cluster.ingress import Forwarder  # noqa: E402
from restune_diffusion.serving.cluster.replica import UNAVAILABLE  # noqa: E402

SENTENCE = "The replicas ended while they worked on the request; send it again."
JSON = (b"content-type", b"application/json")
EVENTS = (b"content-type", b"text/event-stream; charset=utf-8")
DIES = ray_errors.ActorDiedError()


def start(header=JSON, status=200):
    return {"type": "http.response.start", "status": status, "headers": [header]}


def part(text, more=False):
    return {"type": "http.response.body", "body": text.encode(), "more_body": more}


class Stream:
    """Stream of messages, which may end with an error, as Ray's generators do."""

    def __init__(self, messages):
        self._messages = iter(messages)

    def __aiter__(self):
        return self

    async def __anext__(self):
        await asyncio.sleep(0)
        message = next(self._messages, None)
        if message is None:
            raise StopAsyncIteration
        if isinstance(message, Exception):
            raise message
        return message

    def cancel(self):
        raise AssertionError("the client has not left")


class Replicas:
    """Handle of replicas that give the responses of a list, one after the other."""

    def __init__(self, *responses):
        self._responses = iter(responses)
        self.avoided = []

    def options(self, **_):
        return self

    def remote(self, scope, body, tuners, avoid):
        self.avoided.append((list(tuners), list(avoid)))
        return Stream(next(self._responses))


def forward(replicas, path="/v1/images/generations", body=b'{"model": "ink"}'):
    """Return the messages that the client gets."""
    sent = []

    async def run():
        unread = [{"type": "http.request", "body": body}]

        async def receive():
            return unread.pop() if unread else await asyncio.Future()

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": path, "headers": []}
        await asyncio.wait_for(Forwarder(replicas)(scope, receive, send), 10)

    asyncio.run(run())
    return sent


def test_another_replica_answers_if_one_ends_before_its_response_is_complete():
    whole = [start(), part("second")]
    for lost in ([DIES], [start(status=500), DIES], [start(), part("fir", more=True), DIES]):
        replicas = Replicas(lost, whole)
        assert forward(replicas) == whole
        assert replicas.avoided == [(["ink"], []), (["ink"], [])]


def test_a_replica_whose_engine_has_stopped_is_avoided():
    replicas = Replicas(
        [{"type": UNAVAILABLE, "replica": "a"}], [{"type": UNAVAILABLE, "replica": "b"}], [start(), part("c")]
    )
    assert forward(replicas)[-1]["body"] == b"c"
    assert [avoid for _, avoid in replicas.avoided] == [[], ["a"], ["a", "b"]]


@pytest.mark.parametrize(
    ("path", "key"), [("/v1/images/generations", "error"), ("/sdapi/v1/txt2img", "detail")], ids=["openai", "a1111"]
)
def test_a_request_that_no_replica_answers_is_refused_in_the_shape_of_its_api(path, key):
    begin, body = forward(Replicas([DIES], [start(), DIES], [DIES], [start(), part("a fourth")]), path)
    assert begin["status"] == 503
    assert (b"retry-after", b"5") in begin["headers"]
    content = json.loads(body["body"])[key]
    assert (content["message"] if key == "error" else content) == SENTENCE


def test_events_are_sent_at_once_and_a_broken_stream_ends_with_an_error():
    first = part("event: image_generation.partial_image\ndata: {}\n\n", more=True)
    *before, last = forward(Replicas([start(EVENTS), first, DIES], [start(), part("again")]))
    assert before == [start(EVENTS), first]
    assert not last.get("more_body")
    kind, data = last["body"].decode().strip().splitlines()
    assert kind == "event: error"
    event = json.loads(data.removeprefix("data: "))
    assert (event["type"], event["error"]["message"]) == ("error", SENTENCE)
    assert event["error"]["type"] == "server_error"


def test_a_stream_without_events_yet_is_given_to_another_replica():
    whole = [start(EVENTS), part("event: x\ndata: {}\n\n", more=True), part("")]
    assert forward(Replicas([start(EVENTS), DIES], whole)) == whole


def test_a_replica_that_ends_after_its_response_changes_nothing():
    whole = [start(EVENTS), part("event: x\ndata: {}\n\n", more=True), part("")]
    assert forward(Replicas([*whole, DIES])) == whole
