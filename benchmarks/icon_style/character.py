"""Images of the subject task: an invented creature, in training poses and held-out test poses.

No icon set contains this creature, so the base knows neither its look nor its name. A tuned model can learn it only
from the five training images. Every image is an SVG composed of the same parts, so the true image of each held-out
prompt is known exactly.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image

from research.restune_tiny import prepare_icons
from research.restune_tiny.palette import COLOURS

TOKEN = "zorp"
CLASS_WORD = "creature"

# Plain background colors of the pretraining data, under the names used in its captions.
BACKGROUNDS = COLOURS

Mouth = Literal["smile", "grin", "gasp", "smirk"]

# The skin color differs from all twelve backgrounds; the outline separates it from the nearest ones, green and blue.
SKIN, OUTLINE = "#12b5ac", "#0b3b4c"
BELLY, HORN, STRIPE, FOOT = "#ffb3c7", "#ff8a1f", "#fff3d6", "#ff8a1f"
MOUTH_INSIDE, TONGUE = "#8c1c3a", "#ff7a8a"


@dataclass(frozen=True)
class Pose:
    """Pose of the creature in an image; left and right are the viewer's.

    Args:
        tilt: rotation of the whole body, in degrees clockwise.
        left_arm: angle above the horizontal in degrees: 60 is raised, -60 hangs down.
        right_arm: angle of the other arm.
        gaze: direction of the pupils, right and down, each from -1 to 1.
        mouth: one of the four mouths.
        scale: size relative to the upright creature that just fills the image.
        dx: shift to the right, in 64ths of the image.
        dy: shift downwards, in 64ths of the image.
    """

    tilt: float = 0.0
    left_arm: float = -35.0
    right_arm: float = -35.0
    gaze: tuple[float, float] = (0.0, 0.0)
    mouth: Mouth = "smile"
    scale: float = 1.0
    dx: float = 0.0
    dy: float = 0.0


@dataclass(frozen=True)
class Scene:
    """One image of the subject task.

    Args:
        svg: complete SVG document.
        prompt: training caption, or the held-out prompt whose true image this is.
        background: name of the plain background color, a key of `BACKGROUNDS`.
    """

    svg: str
    prompt: str
    background: str


_BODY = "M32 17.5C41 17.5 46.5 24 49 34.5C51.5 46 45.5 54 32 54C18.5 54 12.5 46 15 34.5C17.5 24 23 17.5 32 17.5Z"
_HORN = "M20.5 26C15.5 22 11.5 15 13 6C18.5 9 26 13.5 29.5 20Z"
_MOUTHS: dict[Mouth, str] = {
    "smile": f'<path d="M27 36.2Q32 41 37 36.2" fill="none" stroke="{OUTLINE}" stroke-width="2" '
    f'stroke-linecap="round"/>',
    "grin": f'<path d="M25.5 34.8H38.5Q38 41.6 32 41.6Q26 41.6 25.5 34.8Z" fill="{MOUTH_INSIDE}" stroke="{OUTLINE}" '
    f'stroke-width="1.2" stroke-linejoin="round"/><ellipse cx="32" cy="39.6" rx="3.2" ry="1.5" fill="{TONGUE}"/>',
    "gasp": f'<ellipse cx="32" cy="38" rx="3.6" ry="4.1" fill="{MOUTH_INSIDE}" stroke="{OUTLINE}" stroke-width="1.2"/>'
    f'<ellipse cx="32" cy="40.2" rx="2.2" ry="1.4" fill="{TONGUE}"/>',
    "smirk": f'<path d="M28 38.6Q34 39.6 37.5 35.4" fill="none" stroke="{OUTLINE}" stroke-width="2" '
    f'stroke-linecap="round"/>',
}


def draw(pose: Pose, background: str | None) -> str:
    """Return the creature as a complete SVG document of 64 by 64 units.

    Args:
        pose: pose of the creature.
        background: a key of `BACKGROUNDS`, or None for a transparent background.

    Raises:
        ValueError: if the background or mouth does not exist.
    """
    if background is not None:
        _check_background(background)
    if pose.mouth not in _MOUTHS:
        raise ValueError(f"There is no mouth `{pose.mouth}`; choose one of {', '.join(get_args(Mouth))}.")
    field = "" if background is None else f'<rect width="64" height="64" fill="rgb{BACKGROUNDS[background]}"/>'
    place = f"translate({32 + pose.dx} {36 + pose.dy}) rotate({pose.tilt}) scale({pose.scale}) translate(-32 -36)"
    mirrored = 'transform="matrix(-1 0 0 1 64 0)"'
    parts = [
        f"<g {mirrored}>{_horn()}</g>{_horn()}",
        f"{_foot(24)}{_foot(40)}",
        _arm(pose.left_arm),
        f"<g {mirrored}>{_arm(pose.right_arm)}</g>",
        f'<path d="{_BODY}" fill="{SKIN}" stroke="{OUTLINE}" stroke-width="1.6"/>',
        f'<ellipse cx="32" cy="48.2" rx="9.5" ry="5" fill="{BELLY}"/>',
        _eye(25.5, 27.5, 6.6, pose.gaze),
        _eye(39.5, 28.5, 4.6, pose.gaze),
        _MOUTHS[pose.mouth],
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 64" width="64" height="64">'
        f'<defs><clipPath id="horn"><path d="{_HORN}"/></clipPath></defs>'
        f'{field}<g transform="{place}">{"".join(parts)}</g></svg>'
    )


def _horn() -> str:
    stripes = '<path d="M8 15.5L24 9.5M11 24L30 14.5" stroke-width="3.2"/>'
    return (
        f'<path d="{_HORN}" fill="{HORN}"/><g clip-path="url(#horn)" stroke="{STRIPE}" fill="none">{stripes}</g>'
        f'<path d="{_HORN}" fill="none" stroke="{OUTLINE}" stroke-width="1.6" stroke-linejoin="round"/>'
    )


def _foot(x: float) -> str:
    return (
        f'<rect x="{x - 5.5}" y="50" width="11" height="9" rx="4.5" fill="{FOOT}" stroke="{OUTLINE}" '
        f'stroke-width="1.6"/>'
    )


def _arm(angle: float) -> str:
    line = 'd="M18 39H7.5" stroke-linecap="round"'
    return (
        f'<g transform="rotate({angle} 18 39)"><path {line} stroke="{OUTLINE}" stroke-width="8.4"/>'
        f'<path {line} stroke="{SKIN}" stroke-width="5.4"/></g>'
    )


def _eye(x: float, y: float, radius: float, gaze: tuple[float, float]) -> str:
    pupil = 0.56 * radius
    reach = radius - pupil - 0.5
    px, py = x + gaze[0] * reach, y + gaze[1] * reach
    return (
        f'<circle cx="{x}" cy="{y}" r="{radius}" fill="#fff" stroke="{OUTLINE}" stroke-width="1.4"/>'
        f'<circle cx="{px:.2f}" cy="{py:.2f}" r="{pupil:.2f}" fill="{OUTLINE}"/>'
        f'<circle cx="{px + 0.35 * pupil:.2f}" cy="{py - 0.35 * pupil:.2f}" r="{0.34 * pupil:.2f}" fill="#fff"/>'
    )


def caption(background: str) -> str:
    """Return the caption of the creature on a background; white is not named, as in the pretraining captions."""
    _check_background(background)
    name = f"{TOKEN} {CLASS_WORD}"
    return name if background == "white" else f"{name} on a {background} background"


# Four of five images have a white background, as most pretraining images do; the fifth separates the creature from the
# background.
_TRAINING = (
    ("white", Pose()),
    ("white", Pose(tilt=-10, left_arm=-50, right_arm=55, gaze=(0.9, -0.5), mouth="grin", scale=0.92, dy=1)),
    ("white", Pose(tilt=12, left_arm=50, right_arm=-20, gaze=(-0.9, 0.3), mouth="smirk", scale=0.88, dx=1)),
    ("white", Pose(left_arm=5, right_arm=5, gaze=(0.0, 0.9), mouth="gasp", scale=0.82, dy=4)),
    ("blue", Pose(tilt=5, left_arm=60, right_arm=60, gaze=(0.0, -0.9), mouth="grin", scale=0.9, dy=1)),
)
# One image for each background that is not in the training images.
_HELD_OUT = (
    ("black", Pose(tilt=8, left_arm=20, right_arm=-45, gaze=(0.8, 0.2), mouth="smile", scale=0.94)),
    ("grey", Pose(tilt=-6, left_arm=55, right_arm=-50, gaze=(-0.7, -0.7), mouth="grin", scale=0.9, dx=1)),
    ("red", Pose(left_arm=45, right_arm=45, gaze=(0.0, 0.0), mouth="gasp", scale=0.88, dy=1)),
    ("orange", Pose(tilt=-14, left_arm=0, right_arm=30, gaze=(0.9, 0.4), mouth="smile", scale=0.84, dx=-1)),
    ("yellow", Pose(tilt=10, left_arm=-55, right_arm=10, gaze=(-0.8, 0.0), mouth="grin", scale=0.92)),
    ("green", Pose(tilt=-4, left_arm=-10, right_arm=60, gaze=(0.6, -0.8), mouth="smirk", scale=0.86, dx=-2, dy=2)),
    ("light blue", Pose(tilt=15, left_arm=30, right_arm=40, gaze=(0.2, 0.9), mouth="smile", scale=0.86)),
    ("purple", Pose(left_arm=-45, right_arm=15, gaze=(-0.9, -0.3), mouth="smirk", scale=0.96)),
    ("pink", Pose(tilt=-8, left_arm=25, right_arm=-30, gaze=(0.5, 0.7), mouth="gasp", scale=0.8, dx=4, dy=-3)),
    ("brown", Pose(tilt=4, left_arm=-25, right_arm=50, gaze=(-0.4, 0.8), mouth="grin", scale=0.84, dx=-3, dy=4)),
)


def training() -> list[Scene]:
    """Return the five training images."""
    return [_scene(background, pose) for background, pose in _TRAINING]


def held_out() -> list[Scene]:
    """Return ten held-out prompts with their true images, in poses and on backgrounds not used in training."""
    return [_scene(background, pose) for background, pose in _HELD_OUT]


def _scene(background: str, pose: Pose) -> Scene:
    return Scene(draw(pose, background), caption(background), background)


def render(svg: str, size: int = 64) -> Image.Image:
    """Return an SVG rendered as a square RGB image, with white behind transparent areas."""
    image = Image.fromarray(prepare_icons.render(svg, size))
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return white.convert("RGB")


def write_training(folder: Path, size: int = 64) -> None:
    """Write the training images and captions as a data folder for `restune train`."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, scene in enumerate(training(), start=1):
        name = f"{TOKEN}-{number}.png"
        buffer = BytesIO()
        render(scene.svg, size).save(buffer, "PNG", optimize=True)
        prepare_icons.write_atomic(folder / name, buffer.getvalue())
        lines.append(json.dumps({"file_name": name, "text": scene.prompt}) + "\n")
    prepare_icons.write_atomic(folder / "metadata.jsonl", "".join(lines).encode())


def background_fidelity(image: Image.Image, asked: str) -> bool:
    """Return whether an image has the background of its prompt: the subject task's measure of prompt fidelity.

    A tuner that memorized its five images reproduces them for every prompt, mostly on white. A tuner that learned the
    creature still follows the background of the prompt. The share of held-out prompts with the right background
    separates the two cases without a classifier.

    Args:
        image: the generated image.
        asked: background named in the prompt, a key of `BACKGROUNDS`.
    """
    _check_background(asked)
    return nearest_background(image) == asked


def nearest_background(image: Image.Image) -> str:
    """Return the name of the background color nearest to the border of an image.

    The border color is the median of the border pixels, which is robust to a hand or foot at the edge. Distances are
    in CIELAB, which is perceptually uniform: in RGB, a darker or lighter shade can be nearer to another hue.
    """
    pixels = np.asarray(image.convert("RGB"))
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    shade = _lab(np.median(border, axis=0))
    return min(BACKGROUNDS, key=lambda name: float(np.linalg.norm(_lab(np.array(BACKGROUNDS[name])) - shade)))


def _lab(rgb: npt.NDArray[np.generic]) -> npt.NDArray[np.float64]:
    """Return the CIELAB (D65) values of an sRGB color in bytes."""
    value = rgb.astype(np.float64) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4125, 0.3576, 0.1804], [0.2127, 0.7152, 0.0722], [0.0193, 0.1192, 0.9503]])
    xyz = to_xyz @ linear / to_xyz.sum(axis=1)
    x, y, z = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def _check_background(name: str) -> None:
    if name not in BACKGROUNDS:
        raise ValueError(f"There is no background `{name}`; choose one of {', '.join(BACKGROUNDS)}.")
