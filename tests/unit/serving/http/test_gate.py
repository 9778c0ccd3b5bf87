"""The gate before the API: key, local programs, limits on bodies. And what `restune serve` refuses to start with."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import subprocess
import sys

import pytest

from restune_diffusion.cli.app import parse
from restune_diffusion.serving.http import server
from restune_diffusion.serving.http.gate import Gate, key_digest
from restune_diffusion.serving.http.limits import Limits
from restune_diffusion.utils.errors import RestuneError, UsageError

KEY = "a-long-secret"


async def echo(scope, receive, send):
    body = (await receive()).get("body", b"")
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(len(body)).encode()})


def answer(gate, headers=(), path="/v1/models", parts=(b"",), slow=False):
    """Send a request through the gate; return status and body."""
    sent = []
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    messages[-1]["more_body"] = False

    async def receive():
        if slow and len(messages) == 1:
            await asyncio.sleep(30)
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    pairs = [(name.encode(), value.encode()) for name, value in {"host": "127.0.0.1:8000", **dict(headers)}.items()]
    asyncio.run(gate({"type": "http", "path": path, "headers": pairs}, receive, send))
    return sent[0]["status"], sent[1]["body"].decode()


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        (f"Bearer {KEY}", 200),
        (f"bearer  {KEY} ", 200),
        (basic("any", KEY), 200),
        (basic("", KEY), 200),
        (None, 401),
        ("Bearer", 401),
        ("Bearer " + KEY[:-1], 401),
        (f"Token {KEY}", 401),
        (KEY, 401),
        (basic(KEY, ""), 401),
        ("Basic ????", 401),
        ("Bearer é", 401),
    ],
)
def test_a_key_is_a_bearer_token_or_a_password(authorization, status):
    headers = {} if authorization is None else {"authorization": authorization}
    given, body = answer(Gate(echo, key_digest(KEY.encode()), Limits()), headers)
    assert given == status
    if status == 401:
        assert json.loads(body)["error"]["code"] == "invalid_api_key"


def test_each_api_gets_its_own_shape_of_error():
    gate = Gate(echo, key_digest(KEY.encode()), Limits())
    assert json.loads(answer(gate)[1])["error"]["type"] == "authentication_error"
    assert json.loads(answer(gate, path="/sdapi/v1/options")[1])["detail"].startswith("This server needs an API key")
    assert answer(gate, path="/healthz") == (200, "0")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:8000"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"origin": "http://localhost:3000"}, 200),
        ({"host": "evil.example"}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"host": "[", "origin": "http://["}, 403),
    ],
)
def test_without_a_key_no_page_of_another_site_gets_in(headers, status):
    assert answer(Gate(echo, None, Limits()), headers)[0] == status


def test_a_body_is_limited_in_size_whether_it_is_declared_or_not():
    gate = Gate(echo, None, Limits(body_bytes=10, body_seconds=1))
    assert answer(gate, parts=[b"12345", b"67890"]) == (200, "10")
    for headers, parts in (({"content-length": "11"}, [b"1"]), ({}, [b"12345", b"67890", b"1"])):
        status, body = answer(gate, headers, parts=parts)
        assert status == 413
        assert json.loads(body)["error"]["message"] == "The body is larger than 10 bytes; send smaller images."


def test_a_slow_body_is_given_up():
    gate = Gate(echo, None, Limits(body_seconds=0.05))
    gate._discard_body = lambda *_: asyncio.sleep(0)
    assert answer(gate, parts=[b"1", b"2"], slow=True)[0] == 408


def test_all_bodies_together_are_limited():
    gate = Gate(echo, None, Limits(body_bytes=10, all_bodies_bytes=15))
    gate._held = 6
    # The declared size counts before the body has arrived.
    status, body = answer(gate, {"content-length": "10"}, parts=[b"1"])
    assert status == 503
    assert "too many large requests" in body
    assert answer(gate, parts=[b"123456789"]) == (200, "9")
    assert gate._held == 6


def test_a_server_that_ends_refuses_new_requests():
    gate = Gate(echo, None, Limits())
    gate.draining = True
    assert answer(gate)[0] == 503
    assert answer(gate, path="/readyz")[0] == 200


@pytest.mark.parametrize(
    ("arguments", "variable", "sentence"),
    [
        (["--host", "0.0.0.0"], None, "--host 0.0.0.0 lets other machines in, which needs an API key"),
        (["--host", "::"], "", "needs an API key"),
        (["--host", "192.168.1.5"], None, "needs an API key"),
        (["--host", "example.org"], None, "needs an API key"),
        (["--api-key", ""], None, "at least 8 printable ASCII characters"),
        (["--api-key", "short"], None, "at least 8 printable ASCII characters"),
        (["--host", "0.0.0.0"], "schlüssel-lang", "at least 8 printable ASCII characters"),
    ],
)
def test_a_server_beyond_this_machine_needs_a_key(arguments, variable, sentence, monkeypatch):
    monkeypatch.delenv("RESTUNE_API_KEY", raising=False)
    if variable is not None:
        monkeypatch.setenv("RESTUNE_API_KEY", variable)
    with pytest.raises(UsageError, match=sentence):
        parse(["serve", *arguments]).run()


def test_a_key_comes_from_the_flag_or_the_environment(monkeypatch):
    monkeypatch.setenv("RESTUNE_API_KEY", "key-of-the-environment")
    assert parse(["serve", "--host", "0.0.0.0"]).key() == "key-of-the-environment"
    assert parse(["serve", "--api-key", "key-of-the-flag"]).key() == "key-of-the-flag"
    monkeypatch.delenv("RESTUNE_API_KEY")
    for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"):
        assert parse(["serve", "--host", host]).key() is None


def test_a_port_in_use_is_one_sentence():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(RestuneError, match=f"^Port {port} of 127.0.0.1 is in use by another program; choose"):
            parse(["serve", "--port", str(port)]).run()
    with pytest.raises(RestuneError, match=r"^Cannot listen on port 0 of 203\.0\.113\.1"):
        server.bound_socket("203.0.113.1", 0)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["./nowhere"], "There is no base at ./nowhere"),
        (["--tuners", "./nowhere"], "The tuner folder nowhere does not exist"),
    ],
)
def test_what_does_not_exist_is_one_sentence(arguments, sentence):
    with pytest.raises(RestuneError, match=sentence):
        parse(["serve", *arguments]).run()


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(RestuneError, match=r"needs uvicorn; run pip install 'restune-diffusion\[serve\]'"):
        parse(["serve"]).run()


def test_help_imports_no_heavy_library():
    code = (
        "import sys\nfrom restune_diffusion.cli.app import parse\ntry:\n    parse(['serve', '--help'])\n"
        "except SystemExit:\n    pass\n"
        "print(sorted({'torch', 'diffusers', 'fastapi', 'uvicorn', 'PIL', 'numpy'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "--api-key" in out
    assert out.splitlines()[-1] == "[]"
