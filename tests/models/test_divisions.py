"""Fused weights: every layout in the table is tried on the family's own code, and others are told by trial."""

from __future__ import annotations

import importlib
import inspect
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from lowrank import Policy, adapted_layers, plan_model, presets, wrap_model
from lowrank.families import FUSED, QKV, Role, layout_of
from lowrank.projections import find_projections, scan
from lowrank.targets import select
from tests.helpers import frozen_logits, perturb
from tests.zoo import DECODER, ENCODER

Q, K, V = QKV
TOKENS, WIDTH, HEADS, HEAD = 6, 32, 4, 8

# -- the families' own attentions, small and random ---------------------------------------------------

MODELS = Path(transformers.__file__).parent / "models"
SIZES: dict[str, Any] = {
    **dict.fromkeys(
        "hidden_size embed_dim dim d_model n_embd hidden_dim dim_out hidden_size_output nx".split(), WIDTH
    ),
    **dict.fromkeys("num_heads num_attention_heads n_head n_heads linear_num_value_heads".split(), HEADS),
    **dict.fromkeys("head_dim dim_head kv_channels linear_key_head_dim linear_value_head_dim".split(), HEAD),
    **dict.fromkeys("num_key_value_heads linear_num_key_heads".split(), 2),
    **dict.fromkeys("intermediate_size shared_intermediate_size".split(), 48),
    **dict.fromkeys("dropout attention_dropout attn_pdrop resid_pdrop".split(), 0.0),
    **dict.fromkeys("hidden_dropout_prob attention_probs_dropout_prob hidden_dropout".split(), 0.0),
    **dict.fromkeys(
        "use_rel_pos use_relative_position_embeddings multi_query talking_head has_relative_attention_bias "
        "has_spatial_attention_bias".split(),
        False,
    ),
    **dict.fromkeys("window_size layer_idx stage_idx num_query_pool".split(), 0),
    **dict.fromkeys("num_local_experts num_experts_per_tok".split(), 2),
    "_attn_implementation": "eager",
    "max_position_embeddings": 64,
    "n_positions": 64,
    "context_size": TOKENS,
    "fast_qkv": True,
    "num_kv_heads": HEADS,
    "rotary_dim": HEAD,
    "hidden_act": "silu",
}
# The classes whose constructor does not say which configuration it takes.
CONFIGS = {
    "DeepseekOcr2SamVisionAttention": "DeepseekOcr2SamVisionConfig",
    "GotOcr2VisionAttention": "GotOcr2VisionConfig",
    "PPFormulaNetVisionAttention": "PPFormulaNetVisionConfig",
    "SLANeXtVisionAttention": "SLANeXtVisionConfig",
    "SamHQVisionAttention": "SamHQVisionConfig",
    "SamVisionAttention": "SamVisionConfig",
    "SegGptAttention": "SegGptConfig",
    "UnlimitedOcrSamVisionAttention": "UnlimitedOcrSamVisionConfig",
    "VitDetAttention": "VitDetConfig",
    "CodeGenAttention": "CodeGenConfig",
    "GPTNeoXAttention": "GPTNeoXConfig",
    "GPTNeoXJapaneseAttention": "GPTNeoXJapaneseConfig",
    "GPT2Attention": "GPT2Config",
    "DecisionTransformerGPT2Attention": "DecisionTransformerConfig",
    "ImageGPTAttention": "ImageGPTConfig",
    "openai.Attention": "OpenAIGPTConfig",
    "GPTBigCodeAttention": "GPTBigCodeConfig",
    "DbrxAttention": "DbrxConfig",
    "BarkSelfAttention": "BarkSemanticConfig",
    "LayoutLMv2SelfAttention": "LayoutLMv2Config",
    "deberta.DisentangledSelfAttention": "DebertaConfig",
    "Blip2Attention": "Blip2VisionConfig",
    "BlipAttention": "BlipVisionConfig",
    "InstructBlipAttention": "InstructBlipVisionConfig",
    "InstructBlipVideoAttention": "InstructBlipVideoVisionConfig",
    "PPOCRV5MobileRecAttention": "PPOCRV5MobileRecConfig",
    "PPOCRV5ServerRecAttention": "PPOCRV5ServerRecConfig",
    "PPOCRV6SmallRecAttention": "PPOCRV6SmallRecConfig",
    "Qwen3_5GatedDeltaNet": "Qwen3_5TextConfig",
    "Qwen3_5MoeGatedDeltaNet": "Qwen3_5MoeTextConfig",
}


# What a forward wants beside the hidden states, by argument; the rotation is the identity.
ZEROS = torch.zeros(1, 1, TOKENS, TOKENS, dtype=torch.float64)
ARGUMENTS: dict[str, Any] = {
    "cu_seqlens": torch.tensor([0, TOKENS], dtype=torch.int32),
    "residual": torch.zeros(1, TOKENS, WIDTH, dtype=torch.float64),
    "alibi": torch.zeros(HEADS, 1, TOKENS, dtype=torch.float64),
    "position_bias": torch.zeros(HEADS, 1, TOKENS, dtype=torch.float64),
    "attention_dists": torch.zeros(TOKENS, TOKENS, dtype=torch.long),
    "position_ids": torch.arange(TOKENS)[None],
}
MASKS = {
    "BloomAttention": ZEROS,
    "LayoutLMv2SelfAttention": ZEROS,
    "MptAttention": ZEROS.bool(),
    "deberta.DisentangledSelfAttention": ~ZEROS.bool(),
}


DTYPES = {"LayoutLMv2SelfAttention": torch.float32}  # it fills fp32 scores


def family_module(kind: str, **sizes: Any) -> Any:
    """The class ``kind`` of transformers with small random weights, in fp64."""
    folder, _, name = kind.rpartition(".")
    (file,) = [f for f in MODELS.glob(f"{folder or '*'}/modeling_*.py") if f"class {name}(" in f.read_text()]
    module = importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}")
    cls = getattr(module, name)
    arguments: dict[str, Any] = {}
    for argument, parameter in inspect.signature(cls.__init__).parameters.items():
        if argument == "config":
            named = CONFIGS.get(kind) or str(parameter.annotation).split("|")[0].strip()
            annotated = isinstance(parameter.annotation, type) and kind not in CONFIGS
            config = arguments["config"] = (
                parameter.annotation
                if annotated
                else getattr(module, named, getattr(transformers, named, None))
            )()
            for size, value in {**SIZES, **sizes}.items():
                with suppress(Exception):  # a list by stage, or computed from others
                    if hasattr(config, size) or size.startswith("_"):
                        setattr(config, size, value)
            if hasattr(config, "attn_config"):
                vars(config.attn_config).update(kv_n_heads=2, rope_theta=1e4, clip_qkv=100.0)
        elif argument in SIZES:
            arguments[argument] = SIZES[argument]
        elif argument == "input_size":
            arguments[argument] = (2, 3)
        elif argument == "heads":
            arguments[argument] = HEADS
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        made = cls(**arguments).to(DTYPES.get(kind, torch.float64)).eval()
        for p in made.parameters():
            nn.init.normal_(p, std=max(1, p.shape[-1] if p.dim() else 1) ** -0.5)
    if "GatedDeltaNet" in kind:  # without what mixes tokens or bends the value behind the split
        made.activation, made.norm = None, Ungated()
        made.conv1d.weight.data.zero_()[..., -1] = 1
    return made


class Ungated(nn.Module):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return x


def called(attention: Any, kind: str, leaf: str) -> Callable[..., Tensor]:
    """``output(by)``: ``(tokens, width)`` of ``attention`` where ``by`` is added to what its layer ``leaf`` gives."""
    (name,) = [each for each, _ in attention.named_children() if each.lower() == leaf]
    layer, moved = attention.get_submodule(name), {"by": torch.zeros(())}

    def move(module: nn.Module, args: Any, y: Tensor) -> Tensor:
        padded = y.reshape(-1, y.shape[-1]).clone()  # to whole windows, behind the tokens
        padded[:TOKENS] += moved["by"]
        return padded.view(y.shape)

    layer.register_forward_hook(move)
    width = layer.weight.shape[0 if hasattr(layer, "nf") else 1]
    wanted = list(inspect.signature(attention.forward).parameters)
    x = torch.randn(TOKENS, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(layer.weight)
    extra = {each: ARGUMENTS[each] for each in wanted if each in ARGUMENTS}
    if "position_embeddings" in wanted:
        half = "PersimmonAttention", "GPTNeoXAttention", "GPTNeoXJapaneseAttention"
        size = getattr(attention, "rotary_ndims", HEAD) if kind in half else HEAD
        shape = (TOKENS, size) if "cu_seqlens" in wanted else (1, TOKENS, size)
        extra["position_embeddings"] = torch.ones(shape).double(), torch.zeros(shape).double()
    if "attention_mask" in wanted:
        extra["attention_mask"] = MASKS.get(kind)
    if kind == "FalconAttention":
        extra |= {"alibi": None, "attention_mask": ZEROS}
    shape = (
        (TOKENS, width) if "cu_seqlens" in wanted or kind == "GlmImageVisionAttention" else (1, TOKENS, width)
    )
    plane = "use_rel_pos" in vars(attention) or kind in (
        "VitDetAttention",
        "SegGptAttention",
        "Sam2MultiScaleAttention",
    )
    if plane or kind == "Florence2VisionWindowAttention":
        shape = (1, 2, 3, width)

    def output(by: Tensor | float = 0.0) -> Tensor:
        moved["by"] = torch.as_tensor(by) + torch.zeros(TOKENS, layer_rows(layer), dtype=x.dtype)
        with torch.no_grad():
            if kind.startswith("Evolla"):  # it attends from the latents to both
                y = attention(x=x[None, :2], latents=x[None, 2:], mask=torch.ones(1, TOKENS))
            else:
                y = attention(x.view(shape), **extra)
        y = y if isinstance(y, Tensor) else y[0]
        return y.reshape(-1, y.shape[-1]).double()

    return output


def layer_rows(layer: Any) -> int:
    return layer.nf if hasattr(layer, "nf") else layer.out_features


def moved(rows: slice, width: int, token: int) -> Tensor:
    """A move of these rows at one token: ``(tokens, width)``."""
    by = torch.zeros(TOKENS, width, dtype=torch.float64)
    by[token, rows] = (
        3.0 * torch.ones(rows.stop - rows.start).double() * (-1.0) ** torch.arange(rows.stop - rows.start)
    )
    return by


def assert_acts_as(role: Role, rows: slice, width: int, output: Callable[..., Tensor]) -> None:
    """A query acts on its own token alone; a key and a value on others too, the value in proportion."""
    still = output()
    if role == Q:
        for token in (0, TOKENS - 1):
            change = (output(moved(rows, width, token)) - still).abs().amax(1)
            others = torch.cat([change[:token], change[token + 1 :]])
            assert others.max() <= 1e-6 * still.abs().max(), f"{role} rows {rows} act on other tokens"
        assert change[-1] > 1e-4 * still.abs().max(), f"{role} rows {rows} do nothing"
        return
    by = moved(rows, width, 0)
    change = (output(by) - still)[1:]
    assert change.abs().max() > 1e-4 * still.abs().max(), f"{role} rows {rows} do not act on other tokens"
    bend = (output(2 * by) - still)[1:] - 2 * change
    share = float(bend.abs().max() / change.abs().max())
    assert share < 1e-4 if role == V else share > 1e-3, f"{role} rows {rows}: {share}"


# What the token test cannot see: see the tests of their own below.
ELSEWHERE = {
    "Florence2VisionChannelAttention",
        *FUSED["gate_up_proj"],
    *FUSED["input_linear"],
}
ROWS: list[Any] = [
    (kind, leaf, {"window_size": 3} if "Window" in kind else {})
    for leaf, kinds in FUSED.items()
    for kind in kinds
    if kind not in ELSEWHERE
]
VARIANTS = [
    ("FalconAttention", "query_key_value", {"multi_query": True}),
    ("FalconAttention", "query_key_value", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    ("GPTBigCodeAttention", "c_attn", {"multi_query": True}),
]


@pytest.mark.parametrize(("kind", "leaf", "sizes"), ROWS + VARIANTS)
def test_each_row_of_the_table_is_what_the_family_computes(
    kind: str, leaf: str, sizes: dict[str, Any]
) -> None:
    attention = family_module(kind, **sizes)
    layout = layout_of(attention, leaf)
    assert layout is FUSED[leaf][kind]
    output = called(attention, kind, leaf)
    (layer,) = [child for name, child in attention.named_children() if name.lower() == leaf]
    rows = layer_rows(layer)
    blocks = layout(attention, rows)
    if blocks is None:  # by heads: the first rows of all would not be the query's
        still, third = output(), slice(0, rows // 3)
        change = output(moved(third, rows, 0)) - still
        assert change[1:].abs().max() > 1e-4 * still.abs().max()
        return
    assert sum(size for _, size in blocks) == rows
    start = 0
    for role, size in blocks:
        for first, last in ((0, size), (0, 1), (size - 1, size)):
            assert_acts_as(role, slice(start + first, start + last), rows, output)
        start += size
