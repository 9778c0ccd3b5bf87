"""Routes and files that a request may name."""

import json

import pytest

from restune_diffusion.serving.http.errors import RequestError
from restune_diffusion.studio.safety.rules import PageRules


@pytest.fixture
def rules(tmp_path):
    for folder in ("cache", "runs", "secret"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "image.png").write_bytes(b"")
        (tmp_path / folder / "notes.txt").write_bytes(b"")
    (tmp_path / "cache" / "link.png").symlink_to(tmp_path / "secret" / "image.png")
    (tmp_path / "runs" / "link.png").symlink_to(tmp_path / "secret" / "image.png")
    return PageRules(tmp_path / "cache", [tmp_path / "runs"])


def test_the_page_shows_the_cache_and_images_of_runs(rules, tmp_path):
    for file in ("cache/image.png", "cache/notes.txt", "runs/image.png"):
        rules.check_path(f"/gradio_api/file={tmp_path / file}")


@pytest.mark.parametrize(
    "file",
    [
        "secret/image.png",
        "runs/notes.txt",
        "cache/link.png",
        "runs/link.png",
        "cache/../secret/image.png",
        "image.png",
    ],
)
def test_no_other_file_is_shown(rules, tmp_path, file):
    with pytest.raises(RequestError, match="not shown"):
        rules.check_path(f"/gradio_api/file={tmp_path / file}")


@pytest.mark.parametrize(
    "path",
    ["/gradio_api/file=http://169.254.169.254/latest", "/gradio_api/file=cache/image.png", "/gradio_api/file=~/x",
     "/gradio_api/proxy=http://x", "/gradio_api/vibe-edit/", "/gradio_api/openapi.json", "/monitoring/summary",
     "/gradio_api/run/predict", "/gradio_api/call/predict", "/gradio_api/api/predict", "/gradio_api/file/x",
     "//config", "/config/../gradio_api/dev/reload", "/gradio_api/stream/x", "/docs"],
)  # fmt: skip
def test_routes_that_the_page_does_not_need_do_not_exist(rules, path):
    with pytest.raises(RequestError):
        rules.check_path(path)


def body(*data):
    return json.dumps({"data": data, "fn_index": 0, "session_hash": "x"}).encode()


def test_inputs_name_only_uploaded_files(rules, tmp_path):
    rules.check_body(body("/etc/passwd", None, {"path": str(tmp_path / "cache" / "image.png")}, [{"path": None}]))
    for path in ("/etc/passwd", "http://example.com/x", str(tmp_path / "runs" / "image.png"), "cache/image.png", 3):
        for value in ({"path": path}, [{"image": {"path": path, "meta": {"_type": "gradio.FileData"}}}]):
            with pytest.raises(RequestError, match="not uploaded"):
                rules.check_body(body(value))


@pytest.mark.parametrize("text", [b"", b"{", b"[" * 100_000, b'{"data": ' + b"[" * 500 + b"]" * 500 + b"}"])
def test_a_malformed_event_is_refused(rules, text):
    with pytest.raises(RequestError):
        rules.check_body(text)
