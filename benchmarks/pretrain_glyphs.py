"""Pretrain the packaged backbone from scratch, as a classifier of characters that are in neither glyph benchmark.

    python benchmarks/pretrain_glyphs.py --minutes 34

Every batch is rendered afresh. Difficulty rises over the first part of the run, the learning rate warms up and falls
on a cosine to 0 when either the budget of images or that of minutes ends. A checkpoint is written every
few hundred steps: the same command goes on from it. The head is thrown away at the end.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from one_run import as_csv
from safetensors.torch import save
from torch import Tensor, nn

from avalanche_fmlora.data.glyph_render import available_faces, draw_looks, glyph_mask, render
from avalanche_fmlora.data.glyph_vit import GLYPH_VIT_MEAN, GLYPH_VIT_STD, build_glyph_vit, fold_batch_norm
from avalanche_fmlora.data.glyphs import PRETRAINING_CHARACTERS
from avalanche_fmlora.results.record import write_atomically

ROOT = Path(__file__).resolve().parent.parent


class MaskBank:
    """Masks of all pretraining characters: uint8 [M, 1, MASK_SIZE, MASK_SIZE]; class c has rows first[c]:first[c+1]."""

    def __init__(self, characters: str) -> None:
        faces = [available_faces(char) for char in characters]
        self.first = np.concatenate([[0], np.cumsum([len(f) for f in faces])])
        stacked = np.stack([glyph_mask(c, f) for c, fs in zip(characters, faces, strict=True) for f in fs])
        self.masks = torch.from_numpy(stacked)[:, None]

    def batch(self, rng: np.random.Generator, count: int, difficulty: float) -> tuple[Tensor, Tensor]:
        """Normalised images [count, 3, H, W] of random characters in random faces, and labels [count]."""
        labels = rng.integers(len(self.first) - 1, size=count)
        rows = self.first[labels] + (rng.random(count) * np.diff(self.first)[labels]).astype(np.int64)
        images = render(self.masks[rows].float() / 255, draw_looks(rng, count, difficulty))
        mean, std = (torch.tensor(v)[:, None, None] for v in (GLYPH_VIT_MEAN, GLYPH_VIT_STD))
        return (images - mean) / std, torch.from_numpy(labels)


@dataclass
class Run:
    """What a checkpoint holds beside the weights."""

    step: int = 0
    seconds: float = 0.0
    rows: list[dict[str, float]] = field(default_factory=list)


def accuracy(model: nn.Module, bank: MaskBank, seed: int, difficulty: float = 1.0, batches: int = 5) -> float:
    """Fraction right on images rendered from a seed that training never draws."""
    rng = np.random.default_rng((seed, 1))
    model.eval()
    with torch.no_grad():
        right = [
            (model(x).argmax(1) == y).float().mean().item()
            for x, y in (bank.batch(rng, 256, difficulty) for _ in range(batches))
        ]
    model.train()
    return float(np.mean(right))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Decay for matrices and convolutions only."""
    decayed = [p for n, p in model.named_parameters() if p.ndim >= 2 and "pos_embed" not in n and "token" not in n]
    ids = {id(p) for p in decayed}
    rest = [p for p in model.parameters() if id(p) not in ids]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def export(vit: nn.Module, folder: Path, facts: dict[str, object]) -> str:
    """Write the float16 weights and their description; returns the sha256 of the weights file."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "glyph_vit.safetensors"
    weights.write_bytes(save({k: v.half().contiguous() for k, v in fold_batch_norm(vit).state_dict().items()}))
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    described = {"sha256": digest, "mean": GLYPH_VIT_MEAN, "std": GLYPH_VIT_STD, **facts}
    (folder / "glyph_vit.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    return digest


@click.command()
@click.option("--minutes", default=34.0, help="Budget of training time.")
@click.option("--images", default=2_500_000, help="Budget of images.")
@click.option("--batch-size", default=192)
@click.option("--lr", default=1.5e-3)
@click.option("--weight-decay", default=0.05)
@click.option("--warm-up", default=400, help="Steps.")
@click.option("--ramp", default=0.25, help="Fraction of the run over which difficulty rises to 1.")
@click.option("--seed", default=0)
@click.option("--threads", default=2)
@click.option("--out", default=str(ROOT / "avalanche_fmlora" / "assets"))
@click.option("--log", default=str(ROOT / "benchmarks" / "results" / "pretrain_glyphs.csv"))
@click.option("--checkpoint", default="pretrain_glyphs.pt", help="Written and, if it is there, continued.")
def main(
    minutes: float,
    images: int,
    batch_size: int,
    lr: float,
    weight_decay: float,
    warm_up: int,
    ramp: float,
    seed: int,
    threads: int,
    out: str,
    log: str,
    checkpoint: str,
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    bank = MaskBank(PRETRAINING_CHARACTERS)
    vit = build_glyph_vit(batch_norm=True)
    model = nn.Sequential(vit, nn.Linear(vit.embed_dim, len(PRETRAINING_CHARACTERS)))
    vit.patch_embed.to(memory_format=torch.channels_last)
    for block in vit.blocks:
        block.attn.fused_attn = False  # the fused kernel's bfloat16 backward takes half of the step on CPUs
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay), lr=lr, betas=(0.9, 0.98))
    run, saved = Run(), Path(checkpoint)
    if saved.is_file():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        run = Run(**state["run"])
    steps, loss_sum, since = images // batch_size, 0.0, 0
    start = time.perf_counter() - run.seconds
    progress = min(1.0, max(run.step / steps, run.seconds / (60 * minutes)))  # 1: it is called again after its end
    while progress < 1:
        rng = np.random.default_rng((seed, 0, run.step))
        x, y = bank.batch(rng, batch_size, min(1.0, 0.1 + 0.9 * progress / ramp) * rng.uniform(0.6, 1.0))
        rate = lr * min(1.0, (run.step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(x.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits.float(), y, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        run.step, loss_sum, since = run.step + 1, loss_sum + loss.item(), since + 1
        run.seconds = time.perf_counter() - start
        progress = min(1.0, max(run.step / steps, run.seconds / (60 * minutes)))
        if run.step % 250 == 0 or progress == 1:
            row = {
                "step": run.step,
                "images": run.step * batch_size,
                "loss": round(loss_sum / since, 4),
                "held_out_accuracy": round(accuracy(model, bank, seed), 4),
                "learning_rate": round(rate, 7),
                "seconds": round(run.seconds, 1),
            }
            run.rows.append(row)
            loss_sum, since = 0.0, 0
            click.echo(json.dumps(row))
            write_log(Path(log), run.rows)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "run": vars(run)}
            torch.save(state, saved.with_suffix(".tmp"))
            saved.with_suffix(".tmp").replace(saved)
    facts = {
        "architecture": "timm VisionTransformer: width 128, depth 6, heads 4, 4 convolutions of stride 8, class token",
        "image_size": 32,
        "characters": len(PRETRAINING_CHARACTERS),
        "images": run.step * batch_size,
        "seed": seed,
        "held_out_accuracy": run.rows[-1]["held_out_accuracy"],
        "seconds": round(run.seconds, 1),
    }
    click.echo(f"sha256 {export(vit, Path(out), facts)}")


def write_log(path: Path, rows: list[dict[str, float]]) -> None:
    """All rows so far, as CSV."""
    write_atomically(path, as_csv(list(rows[0]), rows))


if __name__ == "__main__":
    main()
