"""Settings and registration of the family `text`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, TypeAlias

from pydantic import Field, StringConstraints, model_validator

from ...utils.expected import Expected
from ..registry import PartConfig, register_lazy_tuner_family

Token: TypeAlias = Annotated[
    str, StringConstraints(pattern=r"^\S{1,64}$"), Expected("words without spaces, up to 64 letters")
]


class TextConfig(PartConfig):
    """Placeholder tokens for text encoders (Textual Inversion, arXiv 2208.01618), and LoRA (arXiv 2106.09685).

    Neither changes the encoder or the tokenizer: the vectors of the placeholder tokens replace embeddings at lookup,
    and LoRA adds `(alpha / rank) B A x` to the output of a linear layer.
    """

    acts_on_text_encoders: ClassVar[bool] = True
    only_initial: ClassVar[frozenset[str]] = frozenset({"initializers"})

    part: Literal["text"] = "text"
    tokens: tuple[Token, ...] = Field(default=(), max_length=64)
    """Placeholder tokens for prompts, for instance `<dog>`; not case-sensitive."""
    initializers: tuple[Annotated[str, StringConstraints(max_length=200)], ...] = ()
    """Initializer of each placeholder token: existing words, whose embeddings are averaged, or an empty string for
    small random vectors."""
    vectors_per_token: int = Field(default=1, gt=0, le=64)
    """Vectors per placeholder token; each takes one of the 75 tokens of a prompt."""
    rank: int = Field(default=4, ge=0, le=4096)
    """Rank of LoRA; 0 trains placeholder tokens only."""
    alpha: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Numerator of the factor `alpha / rank` on the LoRA residual. If not set, the factor is 1."""
    linears: tuple[str, ...] = ("*",)
    """Patterns of the linear layers that get LoRA, for instance `self_attn.*` or `mlp.fc1`."""
    encoders: tuple[str, ...] = ("*",)
    """Patterns of the text encoders to tune: `text_encoder`, for SDXL also `text_encoder_2`."""

    @model_validator(mode="after")
    def _something_is_trained(self) -> TextConfig:
        if not self.tokens and not self.rank:
            raise ValueError("there are no tokens and the rank of LoRA is 0; set tokens, or a rank above 0")
        if len({token.lower() for token in self.tokens}) != len(self.tokens):
            raise ValueError(
                f"tokens = {' '.join(self.tokens)} are not unique, ignoring case; remove or rename the duplicates"
            )
        if not all(token.isprintable() for token in self.tokens):
            raise ValueError(f"tokens = {self.tokens!r} contain a non-printable character; remove it")
        if self.initializers and len(self.initializers) != len(self.tokens):
            raise ValueError(
                f"there are {len(self.initializers)} initializers for {len(self.tokens)} tokens; "
                "give one per token, or none"
            )
        return self

    @property
    def new_words(self) -> tuple[str, ...]:
        """Placeholder tokens, as in `tokens`."""
        return self.tokens


register_lazy_tuner_family(
    TextConfig,
    "restune_diffusion.tuners.text:TextPart",
    summary="Placeholder tokens for the text encoders (Textual Inversion), and LoRA on their layers.",
)
