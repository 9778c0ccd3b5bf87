"""Custom pipeline for `DiffusionPipeline.from_pretrained(base, custom_pipeline=<this file>, trust_remote_code=True)`.

diffusers copies this file to its cache and wants exactly one pipeline class in it, so it only names the class of the
installed package.
"""

from restune_diffusion.pipelines import (
    RestuneStableDiffusionXLControlNetPipeline as RestuneStableDiffusionXLControlNetPipeline,
)
