"""Which ViT a run stands on: its fields, checked before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from avalanche_fmlora.backbones.registry import EMBEDDED, full_name
from avalanche_fmlora.strict import StrictModel

_RESERVED_ARGS = {
    "img_size": "`image_size`",
    "pretrained": "`pretrained`",
    "num_classes": "nothing: heads are the strategy's",
    "checkpoint_path": "`weights`",
}


class BackboneConfig(StrictModel):
    """Which ViT, whose weights, and how its input is normalised."""

    model_config = ConfigDict(protected_namespaces=())

    name: str = EMBEDDED
    """`glyph_vit` (embedded), a short name (`fmlora list backbones`), or a timm model: `architecture.tag`, or just the
    architecture with `weights`. A short name becomes its full tag."""
    weights: Path | None = None
    """A .safetensors, .pth, .pt or .bin file with a state dict for the architecture; None is the tag's own weights."""
    image_size: int | None = Field(default=None, gt=0)
    """Side of the square input in pixels, a multiple of the patch; None is the model's own."""
    pretrained: bool = True
    """False gives random weights, the same ones every time."""
    model_args: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of `timm.create_model`, such as `depth: 11`."""
    mean: tuple[float, float, float] | None = None
    """Of each channel in [0, 1], subtracted; None is the mean the weights were trained with."""
    std: tuple[float, float, float] | None = None
    """Of each channel, divided by; None is the one the weights were trained with."""
    normalize: Literal["weights", "unit"] = "weights"
    """`weights`: mean and std of the weights, or those given; `unit`: input in [0, 1], as in most published runs."""

    @field_validator("name")
    @classmethod
    def _in_full(cls, name: str) -> str:
        return full_name(name)

    @field_validator("weights")
    @classmethod
    def _home(cls, weights: Path | None) -> Path | None:
        return None if weights is None else weights.expanduser()

    @model_validator(mode="after")
    def _agree(self) -> BackboneConfig:
        if (self.mean is None) != (self.std is None):
            raise ValueError(f"Expected `mean` and `std` together but got mean={self.mean}, std={self.std}.")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"Expected `std` to be above 0 but got {self.std}.")
        if self.mean is not None and self.normalize == "unit":
            raise ValueError("`normalize: unit` is mean 0 and std 1: leave `mean` and `std` out, or say `weights`.")
        if self.weights is not None and not self.pretrained:
            raise ValueError("`pretrained: false` means random weights: leave `weights` out, or `pretrained` at true.")
        for key in sorted(set(self.model_args) & set(_RESERVED_ARGS)):
            raise ValueError(f"`model_args` holds {key!r}, which is set by {_RESERVED_ARGS[key]}: take it out.")
        return self
