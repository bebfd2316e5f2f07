"""What every method of this package trains: a frozen ViT, what is added to it, and one growing head."""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from avalanche_fmlora.modules.adapted_linear import AdaptedLinear, AdaptedMaps
from avalanche_fmlora.modules.head import IncrementalHead
from avalanche_fmlora.modules.prompts import MetaPrompt
from avalanche_fmlora.modules.rank_selector import RankSelector
from avalanche_fmlora.modules.vit import Pooling, TimmViT, forward_features, freeze

_LOG = logging.getLogger(__name__)
_PACKAGE = f"{__name__.partition('.')[0]}."
_KNOWN = (_PACKAGE[:-1], "torch", "timm")
GENERATOR = "generator/"
"""Begins the names of the random generators' states in a file."""
_OWN_PARTS = ("vit", "head", "lora", "prompt", "selector")
_GROWS = " If {} grows from experience to experience, let its `make_room(state)` add what the saved one had."
_NETWORKS_OF: weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[ContinualNetwork]] = weakref.WeakKeyDictionary()


class ContinualNetwork(nn.Module):
    """Frozen ViT + optional low-rank updates + optional shared prompt + head.

    A method with other parts subclasses this: `features` is its forward pass, `begin` and `end` open and close an
    experience, `parameter_groups` says what trains, `extra_loss` adds to the loss, `make_room` lets parts that grow be
    loaded. Files and checkpoints keep its parameters, its buffers, and of numbers and text in its attributes those that
    have changed since it was built.

    Args:
        vit: frozen here; the user's own object, adapted in place (with a warning if another network has it, too).
        head: the classifier.
        lora: the low-rank updates put into `vit`, or None.
        prompt: tokens at the input, or None.

    Attributes:
        last_features: of the latest forward pass, [B, D]: for losses on features.
        selector: the rank selector that a plugin has put here, or None.
        pooling: what the features are, see :func:`~avalanche_fmlora.modules.vit.forward_features`; the head is as wide.
    """

    pooling: Pooling = "model"

    def __init__(
        self,
        vit: TimmViT,
        head: IncrementalHead,
        lora: AdaptedMaps | None = None,
        prompt: MetaPrompt | None = None,
    ) -> None:
        super().__init__()
        self.vit = freeze(vit)
        self.head = head
        self.lora = lora
        self.prompt = prompt
        self.selector: RankSelector | None = None
        self.last_features: Tensor | None = None
        self._built: dict[str, dict[str, Any]] = {}
        self._backbone = frozenset(f"vit.{name}" for name in backbone_parameter_names(vit))
        others = _NETWORKS_OF.setdefault(vit, weakref.WeakSet())
        if lora is not None and others:
            _LOG.warning(
                "This model already serves another strategy, whose features will move with the updates that are put "
                "into it now: give each strategy its own copy.deepcopy(model), unless the other is done with."
            )
        others.add(self)

    def train(self, mode: bool = True) -> ContinualNetwork:
        """The frozen ViT stays in evaluation mode: no dropout, no stochastic depth in features or queries."""
        super().train(mode)
        self.vit.eval()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Without the latest features: they hang on a graph, which can be neither copied nor pickled."""
        return {**self.__dict__, "last_features": None}

    def features(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, D]."""
        prompt = None if self.prompt is None else self.prompt.prompt
        return forward_features(self.vit, images, prompt, pooling=self.pooling)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> logits [B, C] over the classes known."""
        self.last_features = self.features(images)
        return self.head(self.last_features.to(self.head.rows.dtype))

    @torch.no_grad()
    def features_before(self, images: Tensor) -> Tensor:
        """Features of the model before the current experience, [B, D]: the free teacher (no copy, one more pass)."""
        if not self.has_plain_features:
            raise ValueError(
                f"Expected {type(self).__name__}, which has its own `features`, to have its own `features_before`: "
                "write one, or use distillation=0."
            )
        if self.lora is None or self.lora.trains_bases:
            raise ValueError(
                "Expected an experience that trains only the core: bases in training are not kept: use distillation=0."
            )
        anchor = None if self.prompt is None else self.prompt.anchor
        with self.lora.before_update():
            return forward_features(self.vit, images, anchor, pooling=self.pooling)

    @property
    def adapts(self) -> bool:
        """Whether training ever moves the features."""
        return self.lora is not None or self.prompt is not None or not self.has_plain_features

    @property
    def has_plain_features(self) -> bool:
        """Whether features are those of the ViT with updates and prompt, and no subclass calculates others."""
        return type(self).features is ContinualNetwork.features

    @property
    def begin_keeps_features(self) -> bool:
        """Whether features are the same before and after :meth:`begin`, and only training moves them.

        Not taken for granted of a subclass with a `begin` of its own, which may say so here and save a pass.
        """
        return type(self).begin is ContinualNetwork.begin and (self.lora is None or self.lora.begin_keeps_features)

    def extra_loss(self) -> Tensor | None:
        """A method's own term, of the latest forward pass; added to the loss while training."""
        return None

    def begin(self, classes: Iterable[int]) -> None:
        """Open an experience with these classes: what it trains becomes trainable."""
        self.head.begin(classes)
        if self.lora is not None:
            self.lora.unmerge()
            self.lora.begin()
        if self.prompt is not None:
            self.prompt.begin()

    def discard(self) -> None:
        """Let go of an experience that was broken off, as far as its parts were apart from the past's.

        A plain LoRA, bases in training and prompts that all tasks share stay where training has brought them.
        """
        if self.selector is not None and len(self.head.active):
            self.selector.discard()
        self.head.discard()
        if self.lora is not None:
            self.lora.discard()
        if self.prompt is not None:
            self.prompt.discard()

    def end(self, core_step: float = 1.0) -> None:
        """Close the updates of the experience (the head is closed by `head.close`)."""
        if self.lora is not None:
            self.lora.absorb(core_step)
        if self.prompt is not None:
            self.prompt.end()

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """What trains now, by the names of the rates: those of the updates, then rank, prompt, head."""
        groups: dict[str, list[nn.Parameter]] = {} if self.lora is None else self.lora.parameter_groups()
        groups |= {"rank": [], "prompt": [], "head": []}
        if self.selector is not None:
            groups["rank"].append(self.selector.delta)
        if self.prompt is not None:
            groups["prompt"].append(self.prompt.prompt)
        groups["head"] += [p for p in (self.head.active_rows, self.head.active_bias) if p is not None]
        return {name: [p for p in ps if p.requires_grad] for name, ps in groups.items()}

    def adapter_state(self) -> dict[str, Tensor]:
        """A state dict without the backbone's own weights and the rank selector, which each experience sets anew."""
        own = self.state_dict()
        return {k: v for k, v in own.items() if k not in self._backbone and not k.startswith("selector.")}

    def built(self) -> ContinualNetwork:
        """Say that it is built: numbers that its attributes have now are options, which no file takes back."""
        self._built = self._numbers()
        return self

    def adapter_numbers(self) -> dict[str, dict[str, Any]]:
        """Numbers and text in attributes of a subclass and its own parts, by module: what has changed since `built`."""
        changed = {}
        for name, numbers in self._numbers().items():
            before = self._built.get(name, {})
            changed[name] = {k: v for k, v in numbers.items() if k not in before or before[k] != v}
        return {name: numbers for name, numbers in changed.items() if numbers}

    def load_adapter_numbers(self, numbers: Mapping[str, Mapping[str, Any]]) -> None:
        """Put back what :meth:`adapter_numbers` gave; call :meth:`load_adapter_state` before."""
        for part in (self._built, numbers):
            for name, values in part.items():
                vars(self.get_submodule(name)).update(copy.deepcopy(dict(values)))

    def _numbers(self) -> dict[str, dict[str, Any]]:
        return {
            name: {k: copy.deepcopy(v) for k, v in vars(module).items() if _is_number(k, v)}
            for name, module in self.named_modules()
            if name.partition(".")[0] != "vit" and type(module).__module__.partition(".")[0] not in _KNOWN
        }

    def make_room(self, state: Mapping[str, Tensor]) -> None:
        """Before loading: grow what `begin` adds to, until it has a place for each tensor of `state`. Nothing here."""

    def load_adapter_state(self, state: dict[str, Tensor]) -> None:
        """Load what :meth:`adapter_state` gave, into a network of the same configuration; an open experience is let go.

        Raises:
            ValueError: if the names or the width of the head differ.
        """
        width = state["head.rows"].shape[-1] if "head.rows" in state else self.head.dim
        if width != self.head.dim:
            raise ValueError(
                f"Expected a head of width {self.head.dim} but the saved one has {width}: "
                "build the strategy with the `pooling` and the backbone that it was saved with."
            )
        self.make_room(state)
        opened = () if self.lora is None else self.lora.layers[0].opened
        own = {k for k in self.adapter_state() if ".active_" not in k and k.rpartition(".")[2] not in opened}
        given = {k for k in state if ".active_" not in k}
        if own != given:
            raise ValueError(
                f"Expected the state of a network of the same configuration but {sorted(own ^ given)[:3]} differ: "
                "build the strategy with the options that it was saved with."
                + ("" if type(self).__module__.startswith(_PACKAGE) else _GROWS.format(type(self).__name__))
            )
        self.discard()
        self.head.before = self.head.before[:0]
        if self.lora is not None:
            self.lora.unmerge()
        self.load_state_dict(state, strict=False)

    def generator_states(self) -> dict[str, Tensor]:
        """Where the random generators of its parts are, so that what comes next is not drawn as the first was."""
        return {f"{GENERATOR}{name}": generator.get_state() for name, generator in self._generators().items()}

    def load_generator_states(self, states: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`generator_states` gave; call :meth:`load_adapter_state` before."""
        for name, generator in self._generators().items():
            if (state := states.get(f"{GENERATOR}{name}")) is not None:
                generator.set_state(state)

    def _generators(self) -> dict[str, torch.Generator]:
        parts = [(name, m) for name, m in self.named_modules() if name.partition(".")[0] not in ("vit", "selector")]
        held = [(f"{name}.{k}", v) for name, m in parts for k, v in vars(m).items() if isinstance(v, torch.Generator)]
        return dict(held)

    def backbone_weights(self) -> dict[str, Tensor]:
        """The backbone's own tensors under timm's names."""
        tensors = self.vit.state_dict()
        return {name.replace(".base.", "."): tensors[name] for name in backbone_parameter_names(self.vit)}

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]
        """A network that has not trained yet has no rank selector to load: each experience sets it anew."""
        if self.selector is None:
            for name in [name for name in state_dict if name.startswith(f"{prefix}selector.")]:
                del state_dict[name]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def stored_parameters(self) -> int:
        """Numbers kept between experiences besides backbone and head; all parameters of a subclass's own parts."""
        total = self.lora.stored_parameters() if self.lora is not None else 0
        total += self.prompt.prompt.numel() if self.prompt is not None else 0
        return total + sum(p.numel() for n, p in self.named_parameters() if n.partition(".")[0] not in _OWN_PARTS)

    def stored_statistics(self) -> int:
        """Numbers kept between experiences for training only (feature bases, say); prediction does not read them."""
        own = self.lora.stored_statistics() if self.lora is not None else 0
        return own + self.head.stored_statistics()

    def trainable_parameters(self) -> int:
        """Numbers trained in the current experience, the head's rows left out."""
        groups = self.parameter_groups()
        return sum(p.numel() for name, ps in groups.items() if name not in ("head", "rank") for p in ps)


def _is_number(name: str, value: Any) -> bool:
    """Whether an attribute is a number, text, or a list or dict of them, of the module's own."""
    return name != "training" and name[0] != "_" and _is_plain(value)


def _is_plain(value: Any) -> bool:
    """Whether JSON holds it as it is."""
    if isinstance(value, list):
        return all(_is_plain(v) for v in value)
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    return type(value) in (bool, int, float, str)


def backbone_parameter_names(vit: nn.Module) -> list[str]:
    """Names of a model's own weights and buffers, whether its maps are adapted already or not."""
    adapted = [f"{name}." for name, module in vit.named_modules() if isinstance(module, AdaptedLinear)]
    return [
        name
        for name in vit.state_dict()
        if not any(name.startswith(map_) and not name.startswith(f"{map_}base.") for map_ in adapted)
    ]
