"""A real studio over HTTP: the password, other sites, files, and routes that do not exist."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from ...studio_process import StudioProcess

PASSWORD = "correct horse battery"
ROUTES = ("/config", "/theme.css", "/assets/x.js", "/gradio_api/upload_progress?upload_id=x", "/gradio_api/queue/data",
          "/gradio_api/heartbeat/abc", "/gradio_api/app_id", "/gradio_api/info", "/gradio_api/file=/etc/passwd",
          "/gradio_api/startup-events", "/gradio_api/user", "/gradio_api/token", "/monitoring", "/favicon.ico",
          "/manifest.json", "/gradio_api/stream/x/0/1/playlist.m3u8", "/static/x", "/docs")  # fmt: skip


@pytest.fixture(scope="module")
def locked(tmp_path_factory) -> Iterator[StudioProcess]:
    """A studio with a password."""
    home = tmp_path_factory.mktemp("locked") / "home"
    with StudioProcess(home, env={"RESTUNE_PASSWORD": PASSWORD}) as process:
        yield process


@pytest.fixture
def session(locked) -> requests.Session:
    """A client that gave the password."""
    client = requests.Session()
    answer = client.post(f"{locked.url}/login", data={"password": PASSWORD}, timeout=10, allow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    return client


def event_of(url: str, client: requests.Session, element: str, event: str) -> dict[str, object]:
    """Return the function of an event of a component, from the page's own description."""
    config = client.get(f"{url}/config", timeout=10).json()
    component = next(each["id"] for each in config["components"] if each["props"].get("elem_id") == element)
    return next(each for each in config["dependencies"] if [component, event] in [list(t) for t in each["targets"]])


def call(url: str, client: requests.Session, function: dict[str, object], data: list[object]) -> requests.Response:
    """Send an event as the page does."""
    body = {"data": data, "fn_index": function["id"], "session_hash": "test", "trigger_id": None}
    return client.post(f"{url}/gradio_api/queue/join", json=body, timeout=10)


def result(url: str, client: requests.Session) -> dict[str, object]:
    """Return the result of the event of the session."""
    with client.get(f"{url}/gradio_api/queue/data?session_hash=test", stream=True, timeout=30) as stream:
        for line in stream.iter_lines():
            message = json.loads(line.removeprefix(b"data: ")) if line.startswith(b"data: ") else {}
            if message.get("msg") == "process_completed":
                return message
    raise AssertionError("no result")


def test_other_machines_need_a_password(tmp_path):
    command = [sys.executable, "-m", "restune_diffusion", "studio", str(tmp_path), "--host", "0.0.0.0"]
    for arguments in ([], ["--password", "short"]):
        ended = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=60)
        assert ended.returncode == 2
        assert "password" in ended.stderr


def test_nothing_but_the_login_is_shown_without_the_password(locked):
    page = requests.get(locked.url, timeout=10)
    assert page.status_code == 401
    assert 'type="password"' in page.text
    assert "gradio" not in page.text
    for route in ROUTES:
        assert requests.get(locked.url + route, timeout=10).status_code == 401, route
    for route in ("queue/join", "upload?upload_id=x", "reset", "cancel", "run/x", "call/x", "vibe-edit/", "stream/x"):
        answer = requests.post(f"{locked.url}/gradio_api/{route}", json={"data": []}, timeout=10)
        assert answer.status_code == 401, route
    cookies = {f"restune_session_{locked.url.rpartition(':')[2]}": "guess"}
    assert requests.get(f"{locked.url}/config", cookies=cookies, timeout=10).status_code == 401


def test_the_password_opens_a_session_that_ends_with_the_logout(locked, session):
    page = session.get(locked.url, timeout=10)
    assert page.status_code == 200
    assert "gradio" in page.text
    assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
    assert session.post(f"{locked.url}/logout", timeout=10, allow_redirects=False).status_code == 303
    old = dict(session.cookies)
    assert requests.get(f"{locked.url}/config", cookies=old, timeout=10).status_code == 401


@pytest.mark.parametrize(
    "headers", [{"Origin": "https://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}]
)
def test_a_page_of_another_site_cannot_use_the_session(locked, session, headers):
    body = {"data": [], "fn_index": 0, "session_hash": "x"}
    answer = session.post(f"{locked.url}/gradio_api/queue/join", json=body, headers=headers, timeout=10)
    assert answer.status_code == 403
    answer = requests.post(f"{locked.url}/login", data={"password": PASSWORD}, headers=headers, timeout=10)
    assert answer.status_code == 403


def test_the_description_of_the_page_has_no_secret(locked, session):
    text = session.get(f"{locked.url}/config", timeout=10).text + session.get(locked.url, timeout=10).text
    assert PASSWORD not in text
    assert str(locked.home) not in text
    assert PASSWORD not in " ".join(locked.command)


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "{home}/queue/queue.json", "{home}/tuners/ink.safetensors", "{home}/cache/../../outside.txt",
     "{home}/cache/link.txt", "{home}/runs/link.png", "{home}/runs/secret.txt", "http://127.0.0.1:1/x",
     "http://169.254.169.254/latest/meta-data", "file:///etc/passwd", "{home}/cache", "..%2f..%2fetc%2fpasswd",
     "%2fetc%2fpasswd", "/proc/self/environ"],
)  # fmt: skip
def test_no_file_but_those_of_the_page_is_served(studio, path):
    home = studio.home
    (home.parent / "outside.txt").write_text("secret")
    (home / "runs" / "secret.txt").write_text("secret")
    (home / "queue" / "queue.json").write_text("secret")
    (home / "tuners" / "ink.safetensors").write_text("secret")
    for link in (home / "cache" / "link.txt", home / "runs" / "link.png"):
        link.unlink(missing_ok=True)
        link.symlink_to(home.parent / "outside.txt")
    # `requests` would shorten `..`.
    prepared = requests.Request("GET", studio.url).prepare()
    prepared.url = f"{studio.url}/gradio_api/file={path.format(home=home)}"
    answer = requests.Session().send(prepared, timeout=10)
    assert answer.status_code in (403, 404)
    assert "secret" not in answer.text
    assert "root:" not in answer.text


@pytest.mark.parametrize("path", ["/etc/passwd", "{home}/../outside.safetensors", "http://127.0.0.1:1/x.safetensors"])
@pytest.mark.parametrize("meta", [{}, {"meta": {"_type": "gradio.FileData"}}])
def test_a_crafted_event_cannot_name_a_file_that_was_not_uploaded(studio, path, meta):
    (studio.home.parent / "outside.safetensors").write_bytes(b"secret")
    client = requests.Session()
    function = event_of(studio.url, client, "library-upload", "upload")
    file = {"path": path.format(home=studio.home), "orig_name": "x.safetensors", **meta}
    answer = call(studio.url, client, function, ["", None, [file]])
    assert answer.status_code == 403
    assert "not uploaded" in answer.text


def test_a_crafted_event_cannot_name_a_tuner_elsewhere(studio):
    (studio.home.parent / "outside.safetensors").write_bytes(b"secret")
    client = requests.Session()
    function = event_of(studio.url, client, "library-add-run", "click")
    assert call(studio.url, client, function, ["", "../../outside"]).status_code == 200
    message = result(studio.url, client)
    assert message["success"] is False
    assert "not in the list" in json.dumps(message)
    assert "Traceback" not in json.dumps(message)
    assert list((studio.home / "tuners").rglob("outside*")) == []


def test_an_upload_stays_in_the_cache_whatever_its_name(studio):
    before = {path for path in studio.home.parent.rglob("*") if "cache" not in path.parts}
    for name in ("../../../evil.txt", "/tmp/evil.txt", "..\\evil.txt"):
        answer = requests.post(f"{studio.url}/gradio_api/upload", files={"files": (name, b"content")}, timeout=10)
        for path in answer.json() if answer.status_code == 200 else []:
            assert Path(path).resolve().is_relative_to(studio.home.resolve() / "cache")
    assert {path for path in studio.home.parent.rglob("*") if "cache" not in path.parts} == before


def test_no_description_of_an_api_and_no_editor_exist(studio):
    for route in ("/docs", "/openapi.json", "/redoc", "/gradio_api/openapi.json", "/gradio_api/mcp/", "/monitoring",
                  "/gradio_api/vibe-code/", "/gradio_api/proxy=http://127.0.0.1:1/", "/gradio_api/dev/reload",
                  "/gradio_api/runs", "/gradio_api/deep_link"):  # fmt: skip
        assert requests.get(studio.url + route, timeout=10).status_code == 404, route
    information = requests.get(f"{studio.url}/gradio_api/info", timeout=10).json()
    assert information == {"named_endpoints": {}, "unnamed_endpoints": {}}


def test_wrong_passwords_are_slowed(locked):
    statuses: list[int] = []

    def guess(number: int) -> None:
        answer = requests.post(f"{locked.url}/login", data={"password": f"guess {number}"}, timeout=10)
        statuses.append(answer.status_code)

    threads = [threading.Thread(target=guess, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Only five are looked at, or a sixth if the machine took a second for them.
    assert statuses.count(401) in (5, 6)
    assert statuses.count(429) == 20 - statuses.count(401)
    while True:
        answer = requests.post(f"{locked.url}/login", data={"password": PASSWORD}, timeout=10, allow_redirects=False)
        if answer.status_code != 429:
            break
        assert "too many wrong passwords" in answer.text
        time.sleep(int(answer.headers["retry-after"]))
    assert answer.status_code == 303
