"""Names of OpenCLIP's text encoder, as checkpoint files of SD 2.x and XL have it, in the format of transformers."""

from __future__ import annotations

from ...storage.base_files.tensor_header import TensorHeader
from .place import Place

_TOP = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_INSIDE = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
           "attn.out_proj": "self_attn.out_proj"}  # fmt: skip
_BLOCKS = "transformer.resblocks."


def open_clip_places(header: TensorHeader, prefix: str) -> dict[str, Place]:
    """Return the place of each tensor of an OpenCLIP text encoder by its name in transformers.

    Args:
        header: header of the checkpoint file.
        prefix: beginning of the encoder's keys.
    """
    found: dict[str, Place] = {}
    for key in header.shapes:
        name = key.removeprefix(prefix)
        if not key.startswith(prefix):
            continue
        if name in _TOP:
            found[_TOP[name]] = Place(header.path, key)
        elif name == "text_projection":
            found["text_projection.weight"] = Place(header.path, key, transposed=True)
        elif name.startswith(_BLOCKS):
            number, _, inside = name.removeprefix(_BLOCKS).partition(".")
            layer, _, last = inside.rpartition(".")
            start = f"encoder.layers.{number}"
            if last in ("in_proj_weight", "in_proj_bias"):
                # Query, key and value are the thirds of one matrix.
                for third, projection in enumerate(("q_proj", "k_proj", "v_proj")):
                    which = last.removeprefix("in_proj_")
                    found[f"{start}.self_attn.{projection}.{which}"] = Place(header.path, key, third=third)
            elif layer in _INSIDE:
                found[f"{start}.{_INSIDE[layer]}.{last}"] = Place(header.path, key)
    return found
