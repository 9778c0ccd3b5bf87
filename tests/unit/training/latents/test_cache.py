from __future__ import annotations

from pathlib import Path

import pytest
import torch

from restune_diffusion.data.captions import find_examples
from restune_diffusion.data.training_images import load_samples
from restune_diffusion.training.latents.cache import build_cache, encode_image
from restune_diffusion.utils.errors import TrainingError

from ....tiny_training import sd_pipeline, write_images


def test_latents_are_what_the_pipeline_would_decode(images: Path) -> None:
    pipeline = sd_pipeline()
    cache = build_cache(pipeline, load_samples(find_examples(images), 16))
    sample = next(iter(load_samples(find_examples(images), 16)))
    with torch.no_grad():
        posterior = pipeline.vae.encode(sample.pixels[None]).latent_dist
    scale = pipeline.vae.config.scaling_factor
    noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(5))
    drawn = cache.latents[0].draw(torch.Generator().manual_seed(5))
    torch.testing.assert_close(drawn, (posterior.mean[0] + posterior.std[0] * noise) * scale)


def test_each_caption_is_encoded_once(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "data")
    (folder / "metadata.jsonl").unlink()
    cache = build_cache(sd_pipeline(), load_samples(find_examples(folder, "one for all"), 16))
    assert len(cache) == 6
    assert list(cache.conditionings) == ["one for all"]


def test_a_half_precision_autoencoder_encodes_in_fp32(images: Path) -> None:
    pipeline = sd_pipeline().to(torch.float16)
    pixels = next(iter(load_samples(find_examples(images), 16))).pixels
    pipeline.text_encoder.float()  # half precision text is beyond the CPU
    cache = build_cache(pipeline, load_samples(find_examples(images), 16))
    assert pipeline.vae.dtype == torch.float16
    full = encode_image(pipeline.vae.float(), pixels)
    assert torch.equal(cache.latents[0].mean, full.mean)


def test_the_hash_follows_content_and_captions_only(tmp_path: Path) -> None:
    pipeline = sd_pipeline()

    def digest(folder: Path) -> str:
        return build_cache(pipeline, load_samples(find_examples(folder), 16)).data_hash

    one, same, other = (write_images(tmp_path / name, ["red", "blue"]) for name in ("one", "same", "other"))
    text = (other / "metadata.jsonl").read_text()
    (other / "metadata.jsonl").write_text(text.replace("a blue", "one blue"))
    assert digest(one) == digest(same) != digest(other)


def test_latents_that_are_not_finite_name_the_autoencoder_and_the_image(images: Path) -> None:
    pipeline = sd_pipeline()
    with torch.no_grad():
        pipeline.vae.quant_conv.weight.fill_(float("nan"))
    first = find_examples(images)[0].path.name
    with pytest.raises(TrainingError, match=rf"autoencoder \(VAE\).* the image .*{first}"):
        build_cache(pipeline, load_samples(find_examples(images), 16))


def test_embeddings_that_are_not_finite_name_the_text_encoder_and_the_caption(images: Path) -> None:
    pipeline = sd_pipeline()
    with torch.no_grad():
        pipeline.text_encoder.get_input_embeddings().weight.fill_(float("nan"))
    first = find_examples(images)[0].caption
    with pytest.raises(TrainingError, match=f"text encoder.* the caption '{first}'"):
        build_cache(pipeline, load_samples(find_examples(images), 16))
