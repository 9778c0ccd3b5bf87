"""Names of the loggers, and whether they are installed; accelerate is not imported."""

from __future__ import annotations

from importlib.util import find_spec

from ...utils.errors import TrainingError

_TITLES = {"tensorboard": "TensorBoard", "wandb": "Weights & Biases"}


def check_tracker(log_with: str) -> None:
    """Check that a logger that is asked for by name is installed.

    Raises:
        TrainingError: if it is not; accelerate would log nothing and raise no error.
    """
    if log_with in _TITLES and find_spec(log_with) is None:
        raise TrainingError(
            f"{_TITLES[log_with]} is not installed; run pip install 'restune-diffusion[{log_with}]', "
            f"or omit --log-with."
        )
