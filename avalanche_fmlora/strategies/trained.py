"""What users do with a trained strategy: merged weights, a plain timm model, a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from avalanche_fmlora.modules.merging import merged_vit
from avalanche_fmlora.modules.network import GENERATOR, ContinualNetwork
from avalanche_fmlora.modules.vit import TimmViT
from avalanche_fmlora.strategies.config import structural_options
from avalanche_fmlora.strategies.weights import load_adapter, save_adapter


class Trained:
    """The part of :class:`strategies.base.ContinualStrategy` that training itself does not need."""

    method: ClassVar[str]
    model: ContinualNetwork
    config: Any

    def merge(self) -> None:
        """Compute with merged weights: an inference step costs what the bare ViT's does. :meth:`unmerge` is exact."""
        if self.model.lora is not None:
            self.model.lora.merge()

    def unmerge(self) -> None:
        """Compute with the factors again, as training and :meth:`load` do by themselves."""
        if self.model.lora is not None:
            self.model.lora.unmerge()

    def merged_model(self) -> TimmViT:
        """A plain timm model with updates, prompt and head inside; see :func:`modules.merging.merged_vit`."""
        return merged_vit(self.model)

    def save(self, path: str | Path) -> Path:
        """Write all that was added to the backbone (safetensors, no pickle); the backbone itself is not in it.

        Raises:
            ValueError: while an experience is in training: what it trains is no part of the model yet.
        """
        if len(self.model.head.active) or (self.model.lora is not None and self.model.lora.active):
            raise ValueError(
                "Expected a model between experiences but one is in training, or was broken off: save when `train` has "
                "returned, or in a plugin's `after_training_exp`."
            )
        config, numbers = self.config.model_dump(mode="json"), self.model.adapter_numbers()
        weights = self.model.backbone_weights()
        state = {**self.model.adapter_state(), **self.model.generator_states()}
        return save_adapter(Path(path), state, self.method, config, numbers, weights)

    def load(self, path: str | Path) -> None:
        """Read what :meth:`save` wrote, into a strategy of the same method and options around the same backbone.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is torn, or of another method, other options, or other weights of the backbone.
        """
        structural = structural_options(type(self.config))
        config, weights = self.config.model_dump(mode="json"), self.model.backbone_weights()
        state, numbers = load_adapter(Path(path), self.method, config, structural, weights)
        generators = {name: state.pop(name) for name in list(state) if name.startswith(GENERATOR)}
        self.model.load_adapter_state(state)
        self.model.load_generator_states(generators)
        self.model.load_adapter_numbers(numbers)
