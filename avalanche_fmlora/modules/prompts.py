"""Prompts: tokens at the input, and one shared prompt that changes slowly (the meta-prompt)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def insert_tokens(tokens: Tensor, prompt: Tensor, n_prefix: int) -> Tensor:
    """[prefix; P; patches]: put a prompt behind the class and register tokens.

    Args:
        tokens: shape [B, N, D].
        prompt: shape [L, D], or [B, L, D] for one prompt a sample.
        n_prefix: how many tokens come before the patches.

    Returns:
        Shape [B, N + L, D].

    >>> insert_tokens(torch.zeros(2, 3, 4), torch.ones(5, 4), 1).sum(-1)[0]
    tensor([0., 4., 4., 4., 4., 4., 0., 0.])
    """
    if prompt.ndim == 2:
        prompt = prompt.expand(tokens.shape[0], -1, -1)
    return torch.cat([tokens[:, :n_prefix], prompt.to(tokens.dtype), tokens[:, n_prefix:]], dim=1)


def remove_tokens(tokens: Tensor, length: int, n_prefix: int) -> tuple[Tensor, Tensor]:
    """Undo :func:`insert_tokens`: the other tokens [B, N, D] and the prompt's outputs [B, L, D]."""
    rest = torch.cat([tokens[:, :n_prefix], tokens[:, n_prefix + length :]], dim=1)
    return rest, tokens[:, n_prefix : n_prefix + length]


class MetaPrompt(nn.Module):
    """One learnable prompt matrix for all tasks (the DMP of arXiv 2504.08823), with the value it had before the task.

    Args:
        length: L ≥ 1 tokens.
        dim: width D.
        std: of the normal distribution that the prompt is drawn from.

    Attributes:
        prompt: P, shape [L, D].
        anchor: P before the current experience, shape [L, D].
        experience: number t of the current experience, from 1; 0 before the first.
        active: whether an experience is open.
    """

    anchor: Tensor
    experience: Tensor

    def __init__(self, length: int, dim: int, std: float = 0.02) -> None:
        super().__init__()
        if length < 1:
            raise ValueError(
                f"Expected a prompt `length` of at least 1 but got {length}: for none, make no MetaPrompt."
            )
        self.prompt = nn.Parameter(torch.randn(length, dim) * std)
        self.register_buffer("anchor", self.prompt.detach().clone())
        self.register_buffer("experience", torch.zeros((), dtype=torch.long))
        self.active = False

    @torch.no_grad()
    def begin(self) -> None:
        """Remember P as P_{t−1}; it is free to move. A second call before `end` only frees it."""
        self.prompt.requires_grad_(True)
        if self.active:
            return
        self.active = True
        self.anchor.copy_(self.prompt)
        self.experience += 1

    @torch.no_grad()
    def discard(self) -> None:
        """Let go of an open experience, as if it had not begun."""
        if self.active:
            self.active = False
            self.prompt.copy_(self.anchor)
            self.experience -= 1

    def end(self) -> None:
        """Close the experience."""
        self.active = False

    @torch.no_grad()
    def slow_step(self, epsilon: float) -> None:
        """P ← P_{t−1} + ε (P − P_{t−1})."""
        self.prompt.copy_(self.anchor + epsilon * (self.prompt - self.anchor))

    def drift(self) -> Tensor:
        """‖P − P_{t−1}‖², a scalar."""
        return (self.prompt - self.anchor).square().sum()
