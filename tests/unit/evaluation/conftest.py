from __future__ import annotations

import pytest
import torch

from restune_diffusion.cli.run_demo import IMAGES
from restune_diffusion.data.captions import find_examples
from restune_diffusion.data.training_images import load_samples
from restune_diffusion.evaluation import InceptionFeatures, Lpips


@pytest.fixture(scope="session")
def inception() -> InceptionFeatures:
    return InceptionFeatures(batch_size=3)


@pytest.fixture(scope="session")
def lpips() -> Lpips:
    return Lpips()


@pytest.fixture(scope="session")
def icons() -> torch.Tensor:
    """Eight images of the demo, 8 x 3 x 64 x 64 in [0, 1]."""
    return torch.stack([(sample.pixels + 1) / 2 for sample in load_samples(find_examples(IMAGES)[:8], 64)])


@pytest.fixture(scope="session")
def icon_features(inception: InceptionFeatures, icons: torch.Tensor) -> torch.Tensor:
    return inception(icons)
