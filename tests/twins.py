"""What literal twins of several methods share: loops over plain tensors, and ways to run the real one beside them."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / ((a * a).sum().sqrt() * (b * b).sum().sqrt())


def tokens(vit: Any, image: Tensor, prefixes: dict[int, tuple[Tensor, Tensor]]) -> Tensor:
    """One image through a plain ViT, with keys and values in front of those of some blocks."""
    patches = vit.patch_embed.proj(image[None])[0].flatten(1).T
    x = torch.stack([vit.cls_token[0, 0], *patches]) + vit.pos_embed[0]
    for i, block in enumerate(vit.blocks):
        x = x + _attention(block.attn, block.norm1(x), prefixes.get(i))
        x = x + block.mlp(block.norm2(x))
    return vit.norm(x)


def _attention(attn: Any, x: Tensor, prefix: tuple[Tensor, Tensor] | None) -> Tensor:
    dim = x.shape[1]
    q, k, v = (attn.qkv.weight @ x.T + attn.qkv.bias[:, None]).T.split(dim, dim=1)
    if prefix is not None:
        k, v = torch.cat([prefix[0], k]), torch.cat([prefix[1], v])
    size, heads = dim // attn.num_heads, []
    for h in range(attn.num_heads):
        part = slice(h * size, (h + 1) * size)
        heads.append(torch.softmax(q[:, part] @ k[:, part].T / math.sqrt(size), dim=1) @ v[:, part])
    return attn.proj(torch.cat(heads, dim=1))


def step(strategy: Any, images: Tensor, labels: Tensor) -> float:
    """One training step through the strategy's own methods, in the type of its model."""
    strategy.is_training = True
    strategy.model.train()
    strategy.mbatch = [images, labels, torch.zeros_like(labels)]
    strategy.mb_output = strategy.forward()
    strategy.loss = strategy.criterion()
    strategy.optimizer.zero_grad()
    strategy.backward()
    strategy.optimizer_step()
    return strategy.loss.item()


def adam(
    params: list[Tensor], grads: list[Tensor], rates: list[float], state: dict[Any, Any], clip: float = math.inf
) -> None:
    """A literal Adam step, a rate for each tensor, the gradient's norm clipped over all."""
    scale = min(1.0, clip / (math.sqrt(sum(float((g * g).sum()) for g in grads)) + 1e-6))
    state["t"] = t = state.get("t", 0) + 1
    for i, (p, g, rate) in enumerate(zip(params, grads, rates, strict=True)):
        g = g * scale
        m = state["m", i] = 0.9 * state.get(("m", i), torch.zeros_like(p)) + 0.1 * g
        v = state["v", i] = 0.999 * state.get(("v", i), torch.zeros_like(p)) + 0.001 * g * g
        with torch.no_grad():
            p -= rate * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)


def double_strategy(method: str, make_strategy: Any, make_vit: Any, **options: Any) -> tuple[Any, Any]:
    """A strategy that computes in float64, at constant rates, and an untouched copy of its ViT."""
    vit = make_vit(dtype=torch.float64)
    plain = copy.deepcopy(vit)
    vit.patch_embed.register_forward_pre_hook(lambda _, args: (args[0].double(),))
    strategy = make_strategy(method, vit=vit, lr_schedule="constant", **options)
    strategy.model.double()
    return strategy, plain.requires_grad_(False)


def arrays(experience: Any) -> tuple[Tensor, Tensor]:
    """Images (float64) and labels of an experience, with the evaluation transform."""
    pairs = [row[:2] for row in experience.dataset.eval()]
    return torch.stack([x for x, _ in pairs]).double(), torch.tensor([int(y) for _, y in pairs])
