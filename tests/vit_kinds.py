"""Small ViTs of each kind that timm makes, and a network around one with every part at work."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import RmsNorm
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva

from avalanche_fmlora.modules.factorized_lora import FactorizedLoRA
from avalanche_fmlora.modules.head import IncrementalHead
from avalanche_fmlora.modules.network import ContinualNetwork
from avalanche_fmlora.modules.prompts import MetaPrompt
from avalanche_fmlora.modules.vit import Pooling, adapt_linears, feature_dim

EXACT = {"rtol": 0.0, "atol": 1e-10}
ALL_TARGETS = ("q", "k", "v", "proj", "fc1", "fc2")
DINOV3: dict[str, Any] = {
    "kind": Eva,
    "dynamic_img_size": True,
    "qkv_bias": False,
    "init_values": 0.1,
    "rope_type": "dinov3",
    "rope_temperature": 100,
    "rope_rotate_half": True,
    "use_rot_pos_emb": True,
    "use_abs_pos_emb": False,
    "num_reg_tokens": 2,
    "use_fc_norm": False,
}
KINDS: dict[str, dict[str, Any]] = {
    "cls": {},
    "with_head": {"num_classes": 7},
    "avg": {"global_pool": "avg"},
    "avg_without_class_token": {"global_pool": "avg", "class_token": False},
    "max": {"global_pool": "max"},
    "map_siglip": {"global_pool": "map", "class_token": False},
    "map_registers": {"global_pool": "map", "class_token": False, "reg_tokens": 1, "pool_include_prefix": True},
    "registers": {"reg_tokens": 2},
    "registers_without_class_token": {"reg_tokens": 1, "class_token": False, "global_pool": "avg"},
    "dinov2_registers": {"reg_tokens": 2, "no_embed_class": True, "init_values": 1e-2},
    "layer_scale": {"init_values": 0.1},
    "clip": {"pre_norm": True},
    "no_final_norm": {"final_norm": False},
    "qk_norm": {"qk_norm": True, "norm_layer": RmsNorm},
    "scaled_norms": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "dynamic": {"dynamic_img_size": True},
    "dynamic_padded": {"dynamic_img_size": True, "dynamic_img_pad": True, "patch_size": 6},
    "dynamic_registers": {"dynamic_img_size": True, "reg_tokens": 2, "no_embed_class": True},
    "no_position": {"pos_embed": "none"},
    "pooled_prefix": {"global_pool": "avg", "reg_tokens": 1, "pool_include_prefix": True},
    "distilled": {"kind": VisionTransformerDistilled},
    "distilled_with_head": {"kind": VisionTransformerDistilled, "num_classes": 7},
    "wide": {"embed_dim": 24, "num_heads": 3, "depth": 3},
    "eva": {"kind": Eva},
    "dinov3": DINOV3,
    "dinov3_token": DINOV3 | {"global_pool": "token"},
    "dinov3_biased": DINOV3 | {"qkv_bias": True, "dynamic_img_size": False},
    "eva02": {"kind": Eva, "use_rot_pos_emb": True, "qkv_fused": False, "swiglu_mlp": True, "ref_feat_shape": (3, 3)},
    "rope_mixed": {"kind": Eva, "use_rot_pos_emb": True, "rope_type": "mixed", "global_pool": "token"},
    "rope_registers": {"kind": Eva, "use_rot_pos_emb": True, "attn_type": "rope", "num_reg_tokens": 1},
    "perception": {
        "kind": Eva,
        "use_rot_pos_emb": True,
        "attn_type": "rope",
        "global_pool": "map",
        "use_pre_transformer_norm": True,
        "rope_grid_indexing": "xy",
    },
    "shared_heads": DINOV3 | {"attn_type": "rope", "qkv_fused": False, "num_kv_heads": 1, "qk_norm": True},
}


def random_network(
    vit: Any,
    *,
    prompt: int,
    cosine: bool,
    targets: tuple[str, ...] = ALL_TARGETS,
    pooling: Pooling = "model",
) -> ContinualNetwork:
    """Every part non-trivial: random factors and cores, 4 classes of which 1 was never seen."""
    torch.manual_seed(0)
    head = IncrementalHead(feature_dim(vit, pooling), cosine=cosine)
    layers = adapt_linears(vit, targets, None, 2, 0.5)
    meta_prompt = MetaPrompt(prompt, vit.embed_dim, std=1.0) if prompt else None
    network = ContinualNetwork(vit, head, FactorizedLoRA(layers, "first_experience"), meta_prompt).double()
    network.pooling = pooling
    for layer in layers.values():
        for tensor in (layer.up, layer.down, layer.core):
            tensor.data.normal_(0, 0.3)
    head.begin([0, 1, 3])
    with torch.no_grad():
        head.active_rows.normal_()
        if not cosine:
            head.active_bias.normal_()
    head.close()
    return network.eval()
