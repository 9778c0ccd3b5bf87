"""The end of a server: requests in progress are finished or given up, and no file is left."""

from __future__ import annotations

import http.client
import io
import json
import signal
import socket
import threading

import pytest
from PIL import Image

from ....serving_process import ServerProcess, wait_for


def post(server, settings, answers):
    """Send a request in a thread; `answers` gets the status and the body, or None if the connection breaks."""

    def send():
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)
        body = json.dumps({"prompt": "a fox", "size": "64x64", **settings}).encode()
        try:
            connection.request("POST", "/v1/images/generations", body, {"content-type": "application/json"})
            response = connection.getresponse()
            answers.append((response.status, response.read()))
        except (OSError, http.client.HTTPException):
            answers.append(None)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def running(server) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    return int(sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith("restune_running_images")))


def test_requests_in_progress_are_finished_after_a_signal():
    with ServerProcess() as server:
        answers = []
        thread = post(server, {"steps": 50, "n": 2}, answers)
        wait_for(lambda: running(server) == 2)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(120) == 0
        thread.join(60)
        status, body = answers[0]
        assert status == 200
        assert len(json.loads(body)["data"]) == 2
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", server.port))
        assert server.output.endswith("The server has ended.\n")
        assert "Traceback" not in server.output


def test_requests_that_take_too_long_are_given_up():
    with ServerProcess("--grace-seconds", "1") as server:
        answers = []
        thread = post(server, {"steps": 150, "n": 16, "size": "256x256"}, answers)
        wait_for(lambda: running(server) > 0)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(60) == 0
        thread.join(60)
        assert answers[0] is None or answers[0][0] in (500, 503)


def test_kill_9_leaves_no_file(tmp_path, files):
    places = [tmp_path / name for name in ("home", "tmp", "work")]
    for place in places:
        place.mkdir()
    env = {"TMPDIR": str(places[1]), "HOME": str(places[0]), "XDG_CACHE_HOME": str(places[0])}
    stream = io.BytesIO()
    Image.effect_noise((1600, 1600), 80).save(stream, "PNG")
    assert stream.tell() > 2**20  # larger than what a form keeps in memory
    with ServerProcess("--tuners", str(files), env=env, cwd=places[2]) as server:
        part = b'Content-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n' + stream.getvalue()
        fields = {"prompt": "a", "steps": "150", "model": "ink", "size": "256x256"}
        texts = [
            f'Content-Disposition: form-data; name="{name}"\r\n\r\n{value}'.encode() for name, value in fields.items()
        ]
        body = b"".join(b"--edge\r\n" + each + b"\r\n" for each in (part, *texts)) + b"--edge--\r\n"
        # Imported libraries may keep files of their own.
        before = [set(place.rglob("*")) for place in (*places, files)]
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        connection.request("POST", "/v1/images/edits", body, {"content-type": "multipart/form-data; boundary=edge"})
        wait_for(lambda: running(server) == 1)
        server.process.kill()
        server.process.wait()
    assert [set(place.rglob("*")) for place in (*places, files)] == before
