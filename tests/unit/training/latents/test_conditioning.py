from __future__ import annotations

import torch

from restune_diffusion.data.image_files import SizeConditioning
from restune_diffusion.training.latents.text_conditioning import denoiser_inputs, encode_caption, encode_empty_caption

from ....tiny_training import sd_pipeline, sdxl_pipeline

CPU, FP32 = torch.device("cpu"), torch.float32
SIZE = SizeConditioning(original=(20, 24), corner=(0, 2), size=(16, 16))


def test_sd_captions_are_encoded_as_in_the_pipeline() -> None:
    pipeline = sd_pipeline()
    positive, negative = pipeline.encode_prompt("a red disc", CPU, 1, True, negative_prompt="")
    assert torch.equal(encode_caption(pipeline, "a red disc").states, positive[0])
    torch.testing.assert_close(encode_empty_caption(pipeline).states, negative[0])
    assert set(denoiser_inputs([encode_empty_caption(pipeline)], [SIZE], CPU, FP32)) == {"encoder_hidden_states"}


def test_sdxl_gets_pooled_text_and_sizes() -> None:
    pipeline = sdxl_pipeline()
    states, negative, pooled, negative_pooled = pipeline.encode_prompt("a red disc", device=CPU)
    caption, nothing = encode_caption(pipeline, "a red disc"), encode_empty_caption(pipeline)
    inputs = denoiser_inputs([caption, nothing], [SIZE, SIZE], CPU, FP32)
    torch.testing.assert_close(inputs["encoder_hidden_states"], torch.cat([states, negative]))
    added = inputs["added_cond_kwargs"]
    torch.testing.assert_close(added["text_embeds"], torch.cat([pooled, negative_pooled]))
    asked = pipeline._get_add_time_ids((20, 24), (0, 2), (16, 16), FP32, text_encoder_projection_dim=32)
    assert torch.equal(added["time_ids"], asked.repeat(2, 1))
