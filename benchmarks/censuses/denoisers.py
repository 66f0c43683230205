"""Small denoisers of diffusers, and what each is called with: UNet, and transformers of one and two streams.

Their sizes and inputs have too little in common to be guessed: each has a row of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Denoiser:
    """A class of diffusers by name, its settings, and the shapes of its inputs; a tuple of ints is drawn.

    Args:
        fused: with query, key and value in one weight.
    """

    of: str
    settings: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    fused: bool = False


_UNET = Denoiser(
    "UNet2DConditionModel",
    dict(
        sample_size=8, layers_per_block=1, block_out_channels=(32,), norm_num_groups=8,
        cross_attention_dim=16, down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    ),
    dict(sample=(1, 4, 8, 8), timestep=(), encoder_hidden_states=(1, 5, 16)),
)  # fmt: skip
_SD3 = Denoiser(
    "SD3Transformer2DModel",
    dict(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=16, caption_projection_dim=32, pooled_projection_dim=16,
        pos_embed_max_size=8, dual_attention_layers=(0,),
    ),
    dict(
        hidden_states=(1, 4, 8, 8), encoder_hidden_states=(1, 5, 16), pooled_projections=(1, 16),
        timestep=(1,),
    ),
)  # fmt: skip
# Its second attention has no text, and does not run where its weights are fused.
_SD3_OF_ONE = replace(_SD3, settings={**_SD3.settings, "dual_attention_layers": ()})
_FLUX = Denoiser(
    "FluxTransformer2DModel",
    dict(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
    ),
    dict(
        hidden_states=(1, 6, 4), encoder_hidden_states=(1, 5, 16), pooled_projections=(1, 16), timestep=(1,),
        img_ids=(6, 3), txt_ids=(5, 3),
    ),
)  # fmt: skip
_PIXART = Denoiser(
    "PixArtTransformer2DModel",
    dict(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=4, in_channels=4,
        caption_channels=16, cross_attention_dim=32, out_channels=8, norm_num_groups=8,
    ),
    dict(hidden_states=(1, 4, 8, 8), timestep=(1,), encoder_hidden_states=(1, 5, 16)),
)  # fmt: skip
_DIT = Denoiser(
    "DiTTransformer2DModel",
    dict(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=4, in_channels=4,
        out_channels=8, norm_num_groups=8, num_embeds_ada_norm=10,
    ),
    dict(hidden_states=(1, 4, 8, 8), timestep=(1,), class_labels=(1,)),
)  # fmt: skip
_AURA = Denoiser(
    "AuraFlowTransformer2DModel",
    dict(
        sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
        attention_head_dim=8, num_attention_heads=4, joint_attention_dim=16, caption_projection_dim=32,
        out_channels=4, pos_embed_max_size=64,
    ),
    dict(hidden_states=(1, 4, 8, 8), encoder_hidden_states=(1, 5, 16), timestep=(1,)),
)  # fmt: skip
_SANA = Denoiser(
    "SanaTransformer2DModel",
    dict(
        in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=4,
        num_cross_attention_heads=4, cross_attention_head_dim=8, cross_attention_dim=32, caption_channels=16,
        sample_size=8, patch_size=1,
    ),
    dict(hidden_states=(1, 4, 8, 8), encoder_hidden_states=(1, 5, 16), timestep=(1,)),
)  # fmt: skip
_WAN = Denoiser(
    "WanTransformer3DModel",
    dict(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
        text_dim=16, freq_dim=16, ffn_dim=48, num_layers=1, cross_attn_norm=True, rope_max_seq_len=32,
    ),
    dict(hidden_states=(1, 4, 2, 8, 8), timestep=(1,), encoder_hidden_states=(1, 5, 16)),
)  # fmt: skip
_QWEN = Denoiser(
    "QwenImageTransformer2DModel",
    dict(
        patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    ),
    dict(
        hidden_states=(1, 16, 16), encoder_hidden_states=(1, 5, 16), encoder_hidden_states_mask=(1, 5),
        timestep=(1,), img_shapes=(1, 4, 4),
    ),
)  # fmt: skip
_COG = Denoiser(
    "CogVideoXTransformer3DModel",
    dict(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=16, num_layers=1, sample_width=8, sample_height=8, sample_frames=9, patch_size=2,
        temporal_compression_ratio=4, max_text_seq_length=5,
    ),
    dict(hidden_states=(1, 3, 4, 8, 8), encoder_hidden_states=(1, 5, 16), timestep=(1,)),
)  # fmt: skip

DENOISERS = {
    "unet": _UNET, "sd3": _SD3, "flux": _FLUX, "pixart": _PIXART, "dit": _DIT, "auraflow": _AURA,
    "sana": _SANA, "wan": _WAN, "qwen_image": _QWEN, "cogvideox": _COG,
    **{
        f"{name}_fused": Denoiser(each.of, each.settings, each.shapes, fused=True)
        for name, each in (("unet", _UNET), ("sd3", _SD3_OF_ONE), ("flux", _FLUX))
    },
}  # fmt: skip


def denoiser(name: str) -> tuple[Any, dict[str, Any]]:
    """A small random model in evaluation mode, the same each time, and its inputs."""
    import diffusers

    each, draw = DENOISERS[name], torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model: nn.Module = getattr(diffusers, each.of)(**each.settings).eval()
    if each.fused:
        model.fuse_qkv_projections()  # type: ignore[operator]
    with torch.no_grad():
        for parameter in model.parameters():  # what starts as zeros hides what depends on it
            if parameter.dim() > 1 and not parameter.any():
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=draw))

    def input_(key: str, shape: tuple[int, ...]) -> Any:
        if key in ("timestep", "class_labels"):
            return torch.full(shape, 3)
        if key == "img_shapes":
            return [[shape]]
        if key.endswith("_ids"):
            return torch.arange(shape[0]).float()[:, None].expand(shape)
        return torch.ones(shape) if key.endswith("mask") else torch.randn(shape, generator=draw)

    return model, {key: input_(key, shape) for key, shape in each.shapes.items()}
