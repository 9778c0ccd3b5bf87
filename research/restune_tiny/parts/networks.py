"""Architecture of text encoder, U-Net and noise schedule."""

from __future__ import annotations

from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

TEXT_WIDTH = 128


def new_unet() -> UNet2DConditionModel:
    """Return a U-Net with Stable Diffusion 1.5's block structure, widest at the highest resolution."""
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=16,
        out_channels=16,
        block_out_channels=(160, 128, 96, 64),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        layers_per_block=2,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=32,
    )
    for name, parameter in unet.named_parameters():
        if name.endswith(("conv2.weight", "conv2.bias")) or name.startswith("conv_out") or ".proj_out." in name:
            nn.init.zeros_(parameter)
    return unet


def new_text_encoder(vocabulary: int) -> CLIPTextModel:
    """Return a small CLIP text encoder."""
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=4,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=49407,
    )
    config._attn_implementation = "eager"  # several times as fast backward in bfloat16 on a CPU
    return CLIPTextModel(config)


def new_scheduler() -> DDIMScheduler:
    """Return Stable Diffusion's noise schedule with v-prediction."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


class TextAndUNet(nn.Module):
    """Text encoder and U-Net, trained together in the last stages."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.text_encoder = new_text_encoder(vocabulary)
        self.unet = new_unet()

    def forward(self, noisy: Tensor, timesteps: Tensor, ids: Tensor) -> Tensor:
        """Return the predicted velocity."""
        velocity: Tensor = self.unet(noisy, timesteps, self.text_encoder(ids).last_hidden_state).sample
        return velocity
