"""Components of the form, and their values."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...pipelines.schedulers import SCHEDULER_NAMES
from ...storage.base_files.location import BUNDLED_BASE
from .fields import ALL, EACH, GRID, MIX, MODES, MOST_SEED, FormValues, number_or
from .tuner_rows import TunerRows

if TYPE_CHECKING:
    from ...serving.library import TunerLibrary

_OWN_SCHEDULER = "of the base"
_KARRAS = ("dpmpp_2m", "dpmpp_2m_sde", "euler", "heun")


class Form:
    """Form of the tab; build it inside the page.

    Args:
        base: base to begin with.
        library: the library.
    """

    def __init__(self, base: str, library: TunerLibrary) -> None:
        import gradio as gr

        bases = {base: base, str(BUNDLED_BASE): "Small base of this package (64 pixels, for a first try)"}
        components: dict[str, Any] = {}
        components["base"] = gr.Dropdown(
            [(label, value) for value, label in bases.items()],
            value=base,
            allow_custom_value=True,
            label="Base",
            info="The model to generate with. Choose it, or type a folder, a safetensors file, or an id of "
            "huggingface.co.",
            elem_id="gen-base",
        )
        components["prompt"] = gr.Textbox(
            label="Prompt", info="What the image should show.", lines=2, elem_id="gen-prompt"
        )
        components["mode"] = gr.Radio(
            [(label, value) for value, label in MODES.items()], value=MIX, label="Make", elem_id="gen-mode"
        )
        self.rows = TunerRows(library)
        self.words = gr.Button("Add their trigger words to the prompt", size="sm", elem_id="gen-words")
        with gr.Group(visible=False) as self.of_batches:
            components["with_base"] = gr.Checkbox(
                True, label="Also an image without tuners, to compare", elem_id="gen-with-base"
            )
        with gr.Group(visible=False) as self.of_grids:
            components["weights"] = gr.Textbox(
                label="Weights of the columns",
                info="A column for each tuner and weight, for example 0.5, 1. Empty: the weights above. Each line of "
                "the prompt is a row.",
                elem_id="gen-weights",
            )
            components["with_mix"] = gr.Checkbox(False, label="A column with all tuners together", elem_id="gen-mix")
            components["share_steps"] = gr.Number(
                0,
                precision=0,
                minimum=0,
                label="Shared steps",
                info="First steps that all columns share, which keeps one composition.",
                elem_id="gen-share-steps",
            )
        with gr.Row():
            components["seed"] = gr.Number(
                0,
                precision=0,
                minimum=0,
                label="Seed",
                info="The same seed and settings give the same image.",
                elem_id="gen-seed",
            )
            components["random"] = gr.Checkbox(
                True, label="New seed each time", info="Off: the seed stays.", elem_id="gen-random"
            )
            components["images"] = gr.Number(
                1,
                precision=0,
                minimum=1,
                maximum=64,
                label="Seeds",
                info="One image (or batch) for each seed.",
                elem_id="gen-images",
            )
        with gr.Row():
            components["steps"] = gr.Slider(
                1,
                150,
                30,
                step=1,
                label="Steps",
                info="More steps take longer; 20 to 50 are usual.",
                elem_id="gen-steps",
            )
            components["guidance"] = gr.Slider(
                0,
                30,
                7.5,
                step=0.1,
                label="Guidance",
                info="How closely the image follows the prompt; 5 to 9 are usual.",
                elem_id="gen-guidance",
            )
        with gr.Accordion("More settings", open=False, elem_id="gen-more"):
            components["negative_prompt"] = gr.Textbox(
                label="Negative prompt", info="What the image should not show.", elem_id="gen-negative"
            )
            with gr.Row():
                size = "Pixels; 0 is the size that the base was made for."
                components["width"] = gr.Number(
                    0, precision=0, minimum=0, label="Width", info=size, elem_id="gen-width"
                )
                components["height"] = gr.Number(
                    0, precision=0, minimum=0, label="Height", info=size, elem_id="gen-height"
                )
            names = [name for each in SCHEDULER_NAMES for name in _with_karras(each)]
            components["scheduler"] = gr.Dropdown(
                [_OWN_SCHEDULER, *names],
                value=_OWN_SCHEDULER,
                allow_custom_value=True,
                label="Scheduler",
                info="The method that removes the noise step by step.",
                elem_id="gen-scheduler",
            )
            with gr.Row():
                components["clip_skip"] = gr.Number(
                    0,
                    precision=0,
                    minimum=0,
                    label="CLIP skip",
                    info="Layer of the text encoder, counted from the last; 0 is that of the base.",
                    elem_id="gen-clip-skip",
                )
                components["guidance_rescale"] = gr.Slider(
                    0,
                    1,
                    0,
                    step=0.05,
                    label="Guidance rescale",
                    info="Against too much contrast; about 0.7 for bases with v-prediction.",
                    elem_id="gen-rescale",
                )
        with gr.Accordion("Start from an image", open=False, elem_id="gen-start"):
            components["init_image"] = gr.Image(
                type="filepath", sources=["upload", "clipboard"], label="Image to start from", elem_id="gen-init"
            )
            components["strength"] = gr.Slider(
                0.05,
                1,
                0.8,
                step=0.05,
                label="Change",
                info="How much of the image is made new: 1 is all of it.",
                elem_id="gen-strength",
            )
        with gr.Accordion("Control image", open=False, elem_id="gen-control"):
            components["control_from"] = gr.Image(
                type="filepath",
                sources=["upload", "clipboard"],
                label="Photo or drawing",
                elem_id="gen-control-from",
            )
            components["condition"] = gr.Radio(
                [("Compute the condition (edges, palette, ...) from it", "from"), ("It is the condition", "image")],
                value="from",
                label="Use of the control image",
                info="For tuners that follow an image; others ignore it.",
                elem_id="gen-condition",
            )
        self._components = components

    def __getitem__(self, name: str) -> Any:
        return self._components[name]

    @property
    def inputs(self) -> list[Any]:
        """Components whose values `read` takes."""
        return [*self._components.values(), *self.rows.inputs]

    @property
    def outputs(self) -> list[Any]:
        """Components whose values `shown` returns."""
        return [*self._components.values(), *self.rows.outputs]

    def read(self, values: Sequence[Any]) -> tuple[FormValues, bool]:
        """Return the form, and whether it asks for a new seed, from the values of `inputs`."""
        count = len(self._components)
        given = dict(zip(self._components, values[:count], strict=True))
        control, condition = given["control_from"], given["condition"]
        scheduler = str(given["scheduler"] or "").strip()
        form = FormValues(
            base=str(given["base"] or "").strip() or str(BUNDLED_BASE),
            mode=given["mode"],
            prompt=given["prompt"] or "",
            negative_prompt=given["negative_prompt"] or "",
            tuners=self.rows.read(values[count:]),
            seed=int(number_or(given["seed"], 0)),
            images=int(number_or(given["images"], 1)),
            width=int(number_or(given["width"], 0)) or None,
            height=int(number_or(given["height"], 0)) or None,
            steps=int(number_or(given["steps"], 30)),
            guidance=number_or(given["guidance"], 7.5),
            guidance_rescale=number_or(given["guidance_rescale"], 0),
            scheduler=None if scheduler in ("", _OWN_SCHEDULER) else scheduler,
            clip_skip=int(number_or(given["clip_skip"], 0)) or None,
            init_image=given["init_image"],
            strength=number_or(given["strength"], 0.8),
            control_image=control if condition == "image" else None,
            control_from=control if condition == "from" else None,
            with_base=bool(given["with_base"]),
            weights=given["weights"] or "",
            with_mix=bool(given["with_mix"]),
            share_steps=int(number_or(given["share_steps"], 0)),
        )
        return form, bool(given["random"])

    def shown(self, form: FormValues) -> list[Any]:
        """Return values of `outputs` that show a form; the seed then stays."""
        values = {name: getattr(form, name, None) for name in self._components}
        values |= {name: values[name] or 0 for name in ("width", "height", "clip_skip")}
        values |= {"scheduler": form.scheduler or _OWN_SCHEDULER, "random": False, "condition": "from"}
        return [*values.values(), *self.rows.shown(form.tuners)]

    def of_mode(self, mode: str) -> list[Any]:
        """Return the groups of components that a mode shows."""
        import gradio as gr

        return [gr.Group(visible=mode in (EACH, ALL)), gr.Group(visible=mode == GRID)]


def new_seed() -> int:
    """Return a random seed."""
    return secrets.randbelow(MOST_SEED)


def _with_karras(name: str) -> tuple[str, ...]:
    return (name, f"{name}_karras") if name in _KARRAS else (name,)
