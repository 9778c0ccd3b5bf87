"""A server under 1,000 malformed requests: each is refused with one sentence, and nothing is left of it."""

from __future__ import annotations

import base64
import http.client
import io
import json
import random
import struct
import zlib

from PIL import Image

from ....serving_process import ServerProcess

REQUESTS = 1_000
MOST_GROWTH = 48 * 2**20
JSON_TYPE = {"content-type": "application/json"}
OPENAI, EDIT, TXT2IMG, IMG2IMG = "/v1/images/generations", "/v1/images/edits", "/sdapi/v1/txt2img", "/sdapi/v1/img2img"
NAMES = (
    "../../etc/passwd", "/etc/passwd", "..\\..\\boot.ini", "%2e%2e%2fsecret", "ink\0", "ink/../../ink", "~root",
    "ink.safetensors", "\u202egnp", "ink:1e999", "ink:nan", "ink++ink", "+", ":", "ink:0.5+ink:0.5", "\U0001f98a",
    "con", "$(id)", "{0}", "a" * 5000,
)  # fmt: skip


def png(width: int, height: int, pixels: bytes = b"\0" * 100_000) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def file_of(image: Image.Image, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


PHOTO = file_of(Image.effect_noise((64, 64), 50))
BOMB = png(50_000, 50_000, bytes(20 * 2**20))
"""20 MiB of zeros in a file of 20 KiB whose header promises 7.5 GB."""
BAD_IMAGES = (
    b"", b"not an image", PHOTO[:40], BOMB, png(2**31 - 1, 2**31 - 1), png(4097, 4097), b"%PDF-1.4",
    file_of(Image.new("RGB", (8, 8)), "GIF"), file_of(Image.new("RGB", (8, 8)), "TIFF"), PHOTO[: len(PHOTO) // 2],
    b"<svg xmlns='http://www.w3.org/2000/svg'/>",
)  # fmt: skip


def wrong_json(chance: random.Random) -> tuple[str, dict[str, str], bytes]:
    """A body that is not JSON, or not an object."""
    deep = chance.choice([b"[", b'{"a":']) * 100_000
    body = chance.choice([
        b"", b"{", b"null", b"[]", b"3", b'"a"', b"\xff\xfe", deep, b'{"prompt": "a"', b"{'prompt': 'a'}", b"\0" * 100,
        b'{"prompt": ' + b"9" * 5_000 + b"}", chance.randbytes(200),
    ])  # fmt: skip
    return chance.choice([OPENAI, TXT2IMG, IMG2IMG, "/sdapi/v1/png-info"]), JSON_TYPE, body


def wrong_field(chance: random.Random) -> tuple[str, dict[str, str], bytes]:
    """A valid OpenAI body with one wrong field."""
    name, values = chance.choice([
        ("prompt", [None, [], {}, "", 3, "a" * 100_000, "\ud800"]),
        ("n", [0, -1, 17, 10**400, 1.5, "x", [1]]),
        ("size", ["0x0", "63x64", "64", "64x64x64", "99999x64", "4096x4096", "-64x64", "٦٤x٦٤", "x", "", 64]),
        ("steps", [0, -5, 151, 10**30, "x", 1.5, {}]),
        ("guidance", [-1, 101, 1e308, "x", [], float("nan"), float("inf")]),
        ("seed", [-1, 2**63, 10**400, 0.5, "x"]),
        ("scheduler", ["", "x", "euler_", "__class__", "os.system", 3, "a" * 3000]),
        ("model", NAMES),
        ("tuners", [[{"name": name}] for name in NAMES]),
        ("tuners", [3, [3], [[]], [{"weight": 1}], [{"name": "ink", "weight": "x"}], [{"name": "ink"}] * 9,
                    [{"name": "ink", "weight": 1e300}], [{"name": "ink", "x": 1}]]),
        ("conditions", [{"canny": base64.b64encode(bad).decode()} for bad in BAD_IMAGES] + [3, {"a": 3}]),
        ("output_format", ["gif", "svg", "exe", "../png", 3]),
        ("response_format", ["file", 3]),
        ("partial_images", [-1, 4, "x"]),
        ("stream", ["x", 3, [1]]),
        ("output_compression", [-1, 101, "x"]),
        (chance.choice(["unknown", "__proto__", "a" * 300, "\u202e"]), [1]),
    ])  # fmt: skip
    body = {"prompt": "a fox", "steps": 1, "size": "64x64", name: chance.choice(list(values))}
    return OPENAI, JSON_TYPE, json.dumps(body).encode()


def wrong_webui_field(chance: random.Random) -> tuple[str, dict[str, str], bytes]:
    """A valid A1111 body with one wrong field."""
    bad = [base64.b64encode(image).decode() for image in BAD_IMAGES]
    image = base64.b64encode(PHOTO).decode()
    name, values = chance.choice([
        ("prompt", [f"<lora:x{name}:1>" for name in NAMES] + ["<lora:ink:x>", "<lora:ink:1:2>", 3]),
        ("batch_size", [0, -1, 17, 10**20, "x"]),
        ("n_iter", [0, 17, "x"]),
        ("width", [0, 7, 65, 10**9, "x"]),
        ("cfg_scale", [-1, 1e9, "x"]),
        ("seed", [2**63, "x", 1.5]),
        ("sampler_name", ["Warp", "__init__", 3]),
        ("scheduler", ["Warp", 3]),
        ("override_settings", [{"sd_model_checkpoint": "../x"}, {"sd_model_checkpoint": []}, {"x": 1}, 3, [1]]),
        ("alwayson_scripts", [{"ControlNet": {"args": [1]}}, {"x": [1]}, 3]),
        ("init_images", [*([each] for each in bad), [], ["/etc/passwd"], ["http://127.0.0.1/"], "x", [image] * 2]),
        ("mask", [*bad[1:], "x"]),
        ("denoising_strength", [0, -1, 2, "x"]),
        ("resize_mode", [2, 3, 9]),
        ("inpainting_fill", [2, 3, 4]),
    ])  # fmt: skip
    body = {"prompt": "a", "steps": 2, "init_images": [image], "mask": image, name: chance.choice(values)}
    return IMG2IMG, JSON_TYPE, json.dumps(body).encode()


def wrong_form(chance: random.Random) -> tuple[str, dict[str, str], bytes]:
    """A form with a wrong file or field, or one that is malformed."""
    fields = {"prompt": b"a", "steps": b"2"}
    files = {"image": PHOTO}
    match chance.randrange(5):
        case 0:
            files["image"] = chance.choice(BAD_IMAGES)
        case 1:
            files["mask"] = chance.choice([*BAD_IMAGES, file_of(Image.new("RGBA", (8, 8)))])
        case 2:
            files = chance.choice([{}, {"photo": PHOTO}, {"image": PHOTO, "image[]": PHOTO}])
        case 3:
            wrong = [
                ("steps", b"x"),
                ("tuners", b"{"),
                ("size", b"1x1"),
                ("model", b"../x"),
                ("x", b"1"),
                ("strength", b"2"),
            ]
            fields |= [chance.choice(wrong)]
        case 4:
            fields |= {f"field{number}": b"x" for number in range(100)}
    parts = [
        f'Content-Disposition: form-data; name="{name}"\r\n\r\n'.encode() + value for name, value in fields.items()
    ]
    parts += [
        f'Content-Disposition: form-data; name="{name}"; filename="../../{name}.png"\r\n'.encode() + b"\r\n" + value
        for name, value in files.items()
    ]
    body = b"".join(b"--edge\r\n" + part + b"\r\n" for part in parts) + b"--edge--\r\n"
    kind = "multipart/form-data; boundary=edge"
    if chance.random() < 0.1:
        body, kind = chance.choice(
            [(body[:-60], kind), (body, "multipart/form-data"), (b"x", "text/plain"), (b"", kind)]
        )
    return EDIT, {"content-type": kind}, body


def wrong_path(chance: random.Random) -> tuple[str, dict[str, str], bytes]:
    """A path that does not exist."""
    name = chance.choice(
        ["..%2f..%2fetc%2fpasswd", "%00", "%ff%fe", "a" * 3000, "%E2%80%AE", "ink%3Ax", "..;/x", "ink//"]
    )
    return chance.choice(["/v1/models/", "/v1/", "/sdapi/v1/", "/"]) + name, {}, b""


def sentence_of(path: str, content: bytes) -> str:
    body = json.loads(content)
    return body["detail"] if path.startswith("/sdapi") else body["error"]["message"]


def test_malformed_requests_are_refused_with_one_sentence_and_leave_nothing(files):
    chance = random.Random(7)
    makers = [wrong_json, wrong_field, wrong_webui_field, wrong_form, wrong_path]
    with ServerProcess("--tuners", str(files), "--max-upload-mib", "1") as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)

        def ask(path: str, headers: dict[str, str], body: bytes) -> tuple[int, bytes]:
            connection.request("POST" if headers else "GET", path, body, headers)
            response = connection.getresponse()
            return response.status, response.read()

        resident = 0
        for number in range(REQUESTS):
            path, headers, body = makers[number % len(makers)](chance)
            status, content = ask(path, headers, body)
            shown = (path[:80], body[:300], status, content[:300])
            assert 400 <= status < 500, shown
            sentence = sentence_of(path, content)
            assert sentence.endswith((".", "…")), shown
            assert "\n" not in sentence, shown
            assert len(sentence) <= 501, shown
            assert str(files) not in content.decode(), shown
            if number == REQUESTS // 4:
                resident = server.resident_bytes
        large = json.dumps({"prompt": "a", "init_images": ["A" * 3 * 2**20]}).encode()
        for path in (OPENAI, IMG2IMG):
            status, content = ask(path, JSON_TYPE, large)
            assert status == 413
            assert sentence_of(path, content) == "The body is larger than 1048576 bytes; send smaller images."
        assert server.resident_bytes - resident < MOST_GROWTH
        assert "Traceback" not in server.output
        valid = {"prompt": "a fox", "steps": 2, "size": "64x64", "model": "ink"}
        status, content = ask(OPENAI, JSON_TYPE, json.dumps(valid).encode())
        assert status == 200, content
        metrics = ask("/metrics", {}, b"")[1].decode()
        assert "restune_images_submitted_total 1.0" in metrics
