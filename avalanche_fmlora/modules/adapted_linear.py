"""What low-rank methods share: a frozen linear map with an update of some of its outputs; all such maps of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import ClassVar, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AdaptedLinear(nn.Module):
    """A frozen `nn.Linear` and a low-rank update U V of some of its output slices: ``h = W₀x + U V x``.

    A method gives `up_projection` (U, shape [D_out, K]) and `down_projection` (V, shape [K, D_in]). Its own state is
    all that does not lie in `base`.

    Args:
        base: the map; its weight [D_out, D_in] is frozen and never written to.
        slices: the (start, stop) of the output rows that are adapted, in order, P of them, of equal size.
        rank: R.

    Attributes:
        growing: names of buffers whose shape depends on the experiences so far; loading takes the saved shape.
        opened: names of what is there only while an experience trains, None else.

    Raises:
        ValueError: for a rank below 1 or above the smaller side of a slice.
    """

    growing: ClassVar[tuple[str, ...]] = ()
    opened: ClassVar[tuple[str, ...]] = ()
    merged_weight: Tensor | None

    def __init__(self, base: nn.Linear, slices: Sequence[tuple[int, int]], rank: int) -> None:
        super().__init__()
        size = slices[0][1] - slices[0][0]
        limit = min(size, base.in_features)
        if not 1 <= rank <= limit:
            raise ValueError(f"Expected a `rank` between 1 and {limit}, the smaller side of the map, but got {rank}.")
        self.base = base
        self.slices = tuple(slices)
        self.rank = rank
        self.register_buffer("merged_weight", None, persistent=False)

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    @property
    def part_features(self) -> int:
        """Outputs of one slice, D_part."""
        return self.slices[0][1] - self.slices[0][0]

    @property
    def weight(self) -> Tensor:
        """W₀, or the merged weight after :meth:`merge`: shape [D_out, D_in]."""
        return self.base.weight if self.merged_weight is None else self.merged_weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def up_projection(self) -> Tensor:
        """U, shape [D_out, K]."""
        raise NotImplementedError

    def down_projection(self) -> Tensor:
        """V, shape [K, D_in]."""
        raise NotImplementedError

    def delta_weight(self) -> Tensor:
        """U V, shape [D_out, D_in]."""
        return self.up_projection() @ self.down_projection()

    def forward(self, x: Tensor) -> Tensor:
        """[..., D_in] -> [..., D_out]."""
        if self.merged_weight is not None:
            return F.linear(x, self.merged_weight, self.base.bias)
        return self.base(x) + F.linear(F.linear(x, self.down_projection()), self.up_projection())

    def place(self, parts: Tensor, *, shared: bool = False) -> Tensor:
        """Up-projections of the slices as one of the whole map.

        Args:
            parts: shape [P, D_part, K].
            shared: whether all slices read the same K numbers, or each its own.

        Returns:
            Shape [D_out, K] if shared, else [D_out, P·K]; zero where nothing is adapted.
        """
        width = parts.shape[-1] if shared else 0
        blocks, end = [], 0
        for (start, stop), part in zip(self.slices, parts, strict=True):
            if start > end:
                blocks.append(part.new_zeros(start - end, width))
            blocks.append(part)
            end = stop
        if end < self.base.out_features:
            blocks.append(parts.new_zeros(self.base.out_features - end, width))
        if len(blocks) == 1:
            return blocks[0]
        return torch.cat(blocks) if shared else torch.block_diag(*blocks)

    @torch.no_grad()
    def merge(self) -> None:
        """Compute with W₀ + U V as one weight. W₀ itself is kept, so :meth:`unmerge` is exact to the bit."""
        self.merged_weight = self.base.weight + self.delta_weight()

    def unmerge(self) -> None:
        """Compute with W₀ and the factors again."""
        self.merged_weight = None

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """A plain `nn.Linear` with the merged weight."""
        linear = nn.utils.skip_init(nn.Linear, self.in_features, self.out_features, self.base.bias is not None)
        linear = linear.to(self.base.weight)
        linear.weight.copy_(self.base.weight + self.delta_weight())
        if self.base.bias is not None:
            linear.bias.copy_(self.base.bias)
        return linear

    def extra_repr(self) -> str:
        return f"rank={self.rank}, slices={self.slices}"

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]
        self.unmerge()  # the merged weight is of the factors that go now
        for name in self.growing:
            saved, own = state_dict.get(prefix + name), getattr(self, name)
            if saved is not None and saved.shape != own.shape:
                setattr(self, name, own.new_empty(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


LinearT = TypeVar("LinearT", bound=AdaptedLinear)


class AdaptedMaps(nn.Module, Generic[LinearT]):
    """All adapted maps of one model, moved together: what a network calls its `lora`.

    Args:
        layers: by name, in the order of the forward pass. They belong to the model and aren't registered again.

    Attributes:
        experiences: how many experiences have been closed.
        active: whether one is open.
        begin_keeps_features: whether :meth:`begin` changes no output.
    """

    experiences: Tensor
    begin_keeps_features: ClassVar[bool] = True

    def __init__(self, layers: Mapping[str, LinearT]) -> None:
        super().__init__()
        self._layers = dict(layers)
        self.register_buffer("experiences", torch.zeros((), dtype=torch.long))
        self.active = False

    @property
    def layers(self) -> list[LinearT]:
        return list(self._layers.values())

    @property
    def rank(self) -> int:
        return self.layers[0].rank

    @property
    def trains_bases(self) -> bool:
        """Whether the model before the current experience is lost while it trains (see :meth:`before_update`)."""
        return True

    @contextmanager
    def before_update(self) -> Iterator[None]:
        """Inside, the maps are those of before the experience; only where `trains_bases` is false."""
        raise NotImplementedError
        yield

    def begin(self) -> None:
        """Open an experience: what it trains becomes trainable. A second call before `absorb` does nothing."""
        raise NotImplementedError

    def absorb(self, step: float = 1.0) -> None:
        """Close the experience: what was trained joins the past, or its share `step` where a method has such a step."""
        raise NotImplementedError

    def discard(self) -> None:
        """Let go of an open experience: what it has trained so far is dropped, as if it had not begun."""
        for layer in self.layers:
            for name in layer.opened:
                setattr(layer, name, None)
        self.active = False

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """What trains, by the names of the rates."""
        raise NotImplementedError

    def stored_parameters(self) -> int:
        """Numbers of the model that are kept between experiences."""
        raise NotImplementedError

    def stored_statistics(self) -> int:
        """Numbers kept between experiences for training only: no forward pass reads them."""
        return 0

    def merge(self) -> None:
        """Merge every map; see :meth:`AdaptedLinear.merge`."""
        for layer in self.layers:
            layer.merge()

    def unmerge(self) -> None:
        """Unmerge every map."""
        for layer in self.layers:
            layer.unmerge()
