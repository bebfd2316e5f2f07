"""What every method of this package trains: a frozen ViT, what is added to it, and one growing head."""

from __future__ import annotations

import copy
import logging
import math
import weakref
from collections.abc import Iterable
from typing import Any, Literal

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from avalanche_fmlora.modules.adapted_linear import AdaptedLinear, AdaptedMaps
from avalanche_fmlora.modules.head import UNSEEN_LOGIT, IncrementalHead
from avalanche_fmlora.modules.prompts import MetaPrompt
from avalanche_fmlora.modules.rank_selector import RankSelector
from avalanche_fmlora.modules.vit import Pooling, TimmViT, forward_features, freeze, pooling_complement, pools_prefix

_LOG = logging.getLogger(__name__)
_NETWORKS_OF: weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[ContinualNetwork]] = weakref.WeakKeyDictionary()


class ContinualNetwork(nn.Module):
    """Frozen ViT + optional low-rank updates + optional shared prompt + head.

    A method with other parts subclasses this: `features` is its forward pass, `begin` and `end` open and close an
    experience, `parameter_groups` says what trains, `extra_loss` adds to the loss.

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
        return self.lora is not None or self.prompt is not None

    @property
    def begin_keeps_features(self) -> bool:
        """Whether features are the same before and after :meth:`begin`, and only training moves them."""
        return self.lora is None or self.lora.begin_keeps_features

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
        opened = () if self.lora is None else self.lora.layers[0].opened
        own = {k for k in self.adapter_state() if ".active_" not in k and k.rpartition(".")[2] not in opened}
        given = {k for k in state if ".active_" not in k}
        if own != given:
            raise ValueError(
                f"Expected the state of a network of the same configuration but {sorted(own ^ given)[:3]} differ: "
                "build the strategy with the options that it was saved with."
            )
        if self.prompt is not None:
            self.prompt.end()
        if self.lora is not None:
            self.lora.discard()
            self.lora.unmerge()
        self.load_state_dict(state, strict=False)

    def stored_parameters(self) -> int:
        """Numbers kept between experiences besides backbone and head."""
        total = self.lora.stored_parameters() if self.lora is not None else 0
        return total + (self.prompt.prompt.numel() if self.prompt is not None else 0)

    def stored_statistics(self) -> int:
        """Numbers kept between experiences for training only (feature bases, say); prediction does not read them."""
        own = self.lora.stored_statistics() if self.lora is not None else 0
        return own + self.head.stored_statistics()

    def trainable_parameters(self) -> int:
        """Numbers trained in the current experience, the head's rows left out."""
        groups = self.parameter_groups()
        return sum(p.numel() for name, ps in groups.items() if name not in ("head", "rank") for p in ps)


def backbone_parameter_names(vit: nn.Module) -> list[str]:
    """Names of a model's own weights and buffers, whether its maps are adapted already or not."""
    adapted = [f"{name}." for name, module in vit.named_modules() if isinstance(module, AdaptedLinear)]
    return [
        name
        for name in vit.state_dict()
        if not any(name.startswith(map_) and not name.startswith(f"{map_}base.") for map_ in adapted)
    ]


@torch.no_grad()
def merged_vit(network: ContinualNetwork) -> TimmViT:
    """A plain timm ViT with the updates in its weights, the prompt among its register tokens and the head as its head.

    It holds no class of this package: saved with `torch.save`, it loads wherever timm is installed. Logits are the
    network's own, also those of classes never seen; no random number is drawn. A distilled DeiT becomes a ViT with one
    register token. Where the network reads token and mean, so does the pooling (`attn_pool`), for images of the model's
    own size; its features are then twice as wide as timm's `reset_classifier` takes them to be: set `head` yourself for
    other classes.

    Args:
        network: with any of low-rank updates and prompt.
    """
    vit = network.vit
    dtype = next(vit.parameters()).dtype
    merged: Any = copy.deepcopy(vit)
    for name, layer in vit.named_modules():
        if isinstance(layer, AdaptedLinear):
            parent, _, leaf = name.rpartition(".")
            setattr(merged.get_submodule(parent), leaf, layer.to_linear())
    if isinstance(merged, VisionTransformerDistilled):
        _distilled_to_plain(merged)
    if network.prompt is not None:
        _prompt_to_registers(merged, network.prompt.prompt.to(dtype))
    missing = pooling_complement(vit)
    if network.pooling == "token_and_mean" and missing is not None:
        _pool_token_and_mean(merged, missing)
    merged.head = _plain_head(network.head).to(dtype)
    merged.num_classes = network.head.n_classes
    return merged.requires_grad_(True)


def _distilled_to_plain(vit: Any) -> None:
    """Distillation token -> register token; the features stay the mean of its output and the class token's."""
    vit.__class__ = VisionTransformer
    vit.reg_token, vit.num_reg_tokens = vit.dist_token, 1
    del vit.dist_token, vit.head_dist
    # With a stride longer than any sequence, one window is left: the first two tokens.
    vit.attn_pool = nn.Sequential(nn.AvgPool2d((2, 1), stride=(2**20, 1)), nn.Flatten(1))
    vit.pool_include_prefix = True


def _pool_token_and_mean(vit: Any, missing: Literal["mean", "token"]) -> None:
    """Pooling made of torch's own layers: the tokens are a convolution's channels, which fixes how many there are."""
    prefix, patches = vit.num_prefix_tokens, vit.patch_embed
    tokens = prefix + math.prod(patches.dynamic_feat_size(patches.img_size))  # num_patches leaves out what is padded
    token, mean, own = torch.zeros(3, tokens)
    token[0] = 1
    mean[prefix:] = 1 / (tokens - prefix)
    if missing == "token":
        start = 0 if pools_prefix(vit) else prefix
        own[start:] = 1 / (tokens - start)
    else:
        own[: 1 if vit.attn_pool is None else 2] = 1 if vit.attn_pool is None else 1 / 2  # two: a distilled model's
    halves = torch.stack([own, token if missing == "token" else mean]).to(next(vit.parameters()))
    norm = nn.RMSNorm(vit.num_features, elementwise_affine=False)
    vit.attn_pool = nn.Sequential(_token_sums(halves), vit.fc_norm, norm, nn.Flatten(1))
    vit.fc_norm, vit.pool_include_prefix = nn.Identity(), True
    vit.num_features = vit.head_hidden_size = 2 * vit.num_features


def _token_sums(weights: Tensor) -> nn.Conv1d:
    """Weights [K, N] -> the map from N tokens [B, N, D] to K weighted sums of them."""
    sums = nn.utils.skip_init(nn.Conv1d, weights.shape[1], weights.shape[0], 1, bias=False)
    sums.weight = nn.Parameter(weights[..., None])
    return sums


def _prompt_to_registers(vit: Any, prompt: Tensor) -> None:
    prefix = vit.num_prefix_tokens
    if vit.pos_embed is not None and not vit.no_embed_class:
        own = vit.pos_embed[:, :prefix].clone()
        if vit.cls_token is not None:
            vit.cls_token = nn.Parameter(vit.cls_token + own[:, :1])
            own = own[:, 1:]
        if vit.reg_token is not None:
            vit.reg_token = nn.Parameter(vit.reg_token + own)
        vit.pos_embed = nn.Parameter(vit.pos_embed[:, prefix:].clone())
    vit.no_embed_class = True
    registers = [prompt[None]] if vit.reg_token is None else [vit.reg_token, prompt[None]]
    vit.reg_token = nn.Parameter(torch.cat(registers, 1))
    if isinstance(vit.attn_pool, nn.Sequential) and isinstance(vit.attn_pool[0], nn.Conv1d):  # merged before
        weights = vit.attn_pool[0].weight[..., 0]
        unread = weights.new_zeros(len(weights), len(prompt))
        vit.attn_pool[0] = _token_sums(torch.cat([weights[:, :prefix], unread, weights[:, prefix:]], 1))
    vit.num_prefix_tokens += len(prompt)
    if isinstance(vit, Eva):
        for block in vit.blocks:  # rotary positions begin behind them
            block.attn.num_prefix_tokens += len(prompt)
    else:
        vit.num_reg_tokens += len(prompt)


def _plain_head(head: IncrementalHead) -> nn.Module:
    unseen = ~head.seen
    rows = head.prediction_rows() if head.cosine else head.weights()[None]
    count, n_classes = rows.shape[:2]
    biased = not head.cosine or bool(unseen.any())
    linear = nn.utils.skip_init(nn.Linear, head.dim, count * n_classes, bias=biased).to(rows)
    if linear.bias is not None:
        linear.bias.copy_(head.biases().masked_fill(unseen, UNSEEN_LOGIT).repeat(count))
    # RMSNorm without weights is f·√D/‖f‖: with rows s·w/√D behind it the logits are exactly s·f·w/‖f‖.
    linear.weight.copy_(rows.flatten(0, 1) * (head.scale / head.dim**0.5 if head.cosine else 1.0))
    if not head.cosine:
        return linear
    norm = nn.RMSNorm(head.dim, eps=torch.finfo(rows.dtype).tiny, elementwise_affine=False)
    if count == 1:
        return nn.Sequential(norm, linear)
    # As an image of one row for each of the K, so that pooling takes a class's largest.
    largest = nn.Sequential(
        nn.Unflatten(-1, (1, count, n_classes)), nn.AdaptiveMaxPool2d((1, n_classes)), nn.Flatten(1)
    )
    return nn.Sequential(norm, linear, *largest)
