"""Settings of the family `text`, and its registration."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, TypeAlias

from pydantic import Field, StringConstraints, model_validator

from ..registry import PartConfig, register_lazy_tuner_family

Token: TypeAlias = Annotated[str, StringConstraints(pattern=r"^\S{1,64}$")]


class TextConfig(PartConfig):
    """New words for text encoders (Textual Inversion, arXiv 2208.01618), and LoRA on their layers (arXiv 2106.09685).

    Neither touches the encoder or the tokenizer: the vectors of the words replace embeddings as they are looked up,
    and LoRA adds `(alpha / rank) B A x` to what a linear layer returns.
    """

    acts_on_text_encoders: ClassVar[bool] = True

    part: Literal["text"] = "text"
    tokens: tuple[Token, ...] = Field(default=(), max_length=64)
    """New words as they are written in prompts, for instance `<dog>`; upper and lower case are the same."""
    initializers: tuple[Annotated[str, StringConstraints(max_length=200)], ...] = ()
    """For each new word what it starts as: known words, whose vectors' mean it gets, or nothing for small random
    vectors."""
    vectors_per_token: int = Field(default=1, gt=0, le=64)
    """How many vectors stand for a new word; each takes a place of the prompt's 75."""
    rank: int = Field(default=4, ge=0, le=4096)
    """Rank of LoRA; 0 for new words alone."""
    alpha: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Factor `alpha / rank` on what LoRA adds; the rank where not given, which makes the factor 1."""
    linears: tuple[str, ...] = ("*",)
    """Patterns of the linear layers that get LoRA, for instance `self_attn.*` or `mlp.fc1`."""
    encoders: tuple[str, ...] = ("*",)
    """Patterns of the text encoders that the part is for: `text_encoder`, and of SDXL `text_encoder_2` too."""

    @model_validator(mode="after")
    def _something_is_trained(self) -> TextConfig:
        if not self.tokens and not self.rank:
            raise ValueError("there is neither a new token nor LoRA; give tokens, or a rank above 0")
        if len({token.lower() for token in self.tokens}) != len(self.tokens):
            raise ValueError("two new tokens are the same, as upper and lower case do not count")
        if not all(token.isprintable() for token in self.tokens):
            raise ValueError("a new token holds a character that cannot be shown")
        if self.initializers and len(self.initializers) != len(self.tokens):
            raise ValueError(f"there are {len(self.initializers)} initializers for {len(self.tokens)} tokens")
        return self

    @property
    def new_words(self) -> tuple[str, ...]:
        """The new tokens."""
        return self.tokens


register_lazy_tuner_family(
    TextConfig,
    "restune_diffusion.tuners.text:TextPart",
    summary="New words for the text encoders (Textual Inversion), and LoRA on their layers.",
)
