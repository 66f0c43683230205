"""How fused weights are laid out: which of their rows are the query's, the key's, the value's.

By the name of the weight and the class of the module that holds it. What no table knows is tried out: see
`structure`. It looks at names and attributes, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from lowrank.linalg.rows import Rows, repeating
from lowrank.models.families import Role

Sizes = Sequence[tuple[Role, int]]  # roles and row counts, in the order in which they are stored
Blocks = Sequence[tuple[Role, Rows]]  # the rows of each role
Layout = Callable[[Any, int], Blocks]  # of a weight of so many rows, by the module that holds it

QKV = (Role.QUERY, Role.KEY, Role.VALUE)

# Names of weights that hold several projections, and which. What is not in `FUSED` is tried out.
FUSED_NAMES = {
    **dict.fromkeys(
        "c_attn qkv qkv_proj wqkv w_pack in_proj to_qkv query_key_value qkv_linear att_proj in_proj_qkv "
        "in_proj_qkvz queries_keys_values to_added_qkv".split(),
        QKV,
    ),
    **dict.fromkeys("kv to_kv kv_proj linear_kv keys_values".split(), QKV[1:]),
}
LATENT = frozenset("kv_a_proj_with_mqa kv_b_proj".split())  # DeepSeek: key and value from one latent
GATED_NAMES = frozenset("gate_up_proj gate_up".split())


# -- layouts ------------------------------------------------------------------------------------------


def interleaved(groups: int, sizes: Sizes) -> Blocks:
    """``groups`` times all of ``sizes``, one after the other; einops: ``(groups (query key value)) i``."""
    stride, start, blocks = sum(size for _, size in sizes), 0, []
    for role, size in sizes:
        blocks.append((role, repeating(start, size, stride, groups)))
        start += size
    return blocks


def in_order(sizes: Sizes) -> Blocks:
    """One block of rows each; einops: ``(query key value) i``."""
    return interleaved(1, sizes)


def thirds(parent: Any, rows: int) -> Blocks:
    """Query, key and value, of one size."""
    return in_order([(role, rows // 3) for role in QKV])


def halves(parent: Any, rows: int) -> Blocks:
    """Key and value, of one size."""
    return in_order([(role, rows // 2) for role in QKV[1:]])


def grouped(kv_rows: Callable[[Any], int]) -> Layout:
    """The query, then key and value of ``kv_rows(parent)`` rows each."""

    def blocks(parent: Any, rows: int) -> Blocks:
        kv = kv_rows(parent)
        return in_order([(Role.QUERY, rows - 2 * kv), (Role.KEY, kv), (Role.VALUE, kv)])

    return blocks


def by_heads(head_rows: Callable[[Any], int]) -> Layout:
    """Query, key and value of one head, of ``head_rows(parent)`` rows each, then of the next.

    einops: ``(heads three d) i``.
    """

    def blocks(parent: Any, rows: int) -> Blocks:
        size = head_rows(parent)
        return interleaved(rows // (3 * size), [(role, size) for role in QKV])

    return blocks


def by_kv_heads(kv_heads: int, heads: int, size: int) -> Blocks:
    """The queries that share a key head, that key and its value, then the next; heads of ``size`` rows.

    einops: ``(kv_heads (queries key value) d) i``.
    """
    queries = heads // kv_heads * size
    return interleaved(kv_heads, [(Role.QUERY, queries), (Role.KEY, size), (Role.VALUE, size)])


def _gpt2(parent: Any, rows: int) -> Blocks:
    return (halves if getattr(parent, "is_cross_attention", False) else thirds)(parent, rows)


def _gpt_big_code(parent: Any, rows: int) -> Blocks:
    if parent.multi_query:
        return grouped(lambda m: m.kv_dim)(parent, rows)
    return (halves if parent.is_cross_attention else by_heads(_head_dim))(parent, rows)


def _falcon(parent: Any, rows: int) -> Blocks:
    if parent.new_decoder_architecture:
        return by_kv_heads(parent.num_kv_heads, parent.num_heads, parent.head_dim)
    return (grouped if parent.multi_query else by_heads)(_head_dim)(parent, rows)


def _codegen(parent: Any, rows: int) -> Blocks:
    """Four parts, for the four cores that it was trained on; einops: ``(four (query value key)) i``."""
    return interleaved(4, [(role, rows // 12) for role in (Role.QUERY, Role.VALUE, Role.KEY)])


def _gated_delta_net(parent: Any, rows: int) -> Blocks:
    sizes = [(Role.QUERY, parent.key_dim), (Role.KEY, parent.key_dim), (Role.VALUE, parent.value_dim)]
    return in_order(sizes)


def _gated_delta_net_by_heads(parent: Any, rows: int) -> Blocks:
    """Of each key head its query, its key, the values that share it, and their gates."""
    key, values = parent.head_k_dim, parent.num_v_heads // parent.num_k_heads * parent.head_v_dim
    sizes = [(Role.QUERY, key), (Role.KEY, key), (Role.VALUE, values), (Role.OTHER, values)]
    return interleaved(parent.num_k_heads, sizes)


def _davit(parent: Any, rows: int) -> Blocks:
    """DaViT calls query what its attention is multiplied with: softmax(keyᵀ·value)·query."""
    return in_order([(role, rows // 3) for role in (Role.VALUE, Role.QUERY, Role.KEY)])


def _global_context(parent: Any, rows: int) -> Blocks:
    """GCViT: the query may come from the whole image."""
    return (halves if parent.use_global else thirds)(parent, rows)


def whole_up(parent: Any, rows: int) -> Blocks:
    return in_order([(Role.UP, rows)])


def gate_up(parent: Any, rows: int) -> Blocks:
    return in_order([(Role.GATE, rows // 2), (Role.UP, rows // 2)])


def _up_gate(parent: Any, rows: int) -> Blocks:
    return in_order([(Role.UP, rows // 2), (Role.GATE, rows // 2)])


def _head_dim(parent: Any) -> int:
    return parent.head_dim


def _head_size(parent: Any) -> int:
    return parent.head_size


def _kv_heads(parent: Any) -> int:
    return parent.num_key_value_heads * parent.head_dim


# -- the table ----------------------------------------------------------------------------------------

# By name of the weight and class of the module that holds it, read in transformers 5.23, diffusers 0.42 and
# timm 1.0. A class whose name says too little has its folder or its file before it. tests/models/ has
# test_divisions.py, test_diffusers.py and test_timm.py, which try every row.
_TABLE: dict[str, dict[Layout, str]] = {
    "qkv": {
        thirds: "Blip2Attention BlipAttention CohereCompassVisionAttention "
        "DeepseekOcr2SamVisionAttention Dots3NoteVisionAttention "
        "Ernie4_5_VLMoeVisionAttention Florence2VisionChannelAttention "
        "Florence2VisionWindowAttention Glm4vMoeVisionAttention Glm4vVisionAttention "
        "Glm5NextVisionAttention GlmImageVisionAttention GlmOcrVisionAttention GotOcr2VisionAttention "
        "HieraMaskUnitAttention InstructBlipAttention InstructBlipVideoAttention MgpstrAttention "
        "PPFormulaNetVisionAttention PPOCRV5MobileRecAttention PPOCRV5ServerRecAttention "
        "PPOCRV6SmallRecAttention Qwen2_5_VLVisionAttention Qwen3OmniMoeVisionAttention "
        "Qwen3VLMoeVisionAttention Qwen3VLVisionAttention Qwen3_5MoeVisionAttention "
        "Qwen3_5VisionAttention Qwen4ExpVisionAttention SLANeXtVisionAttention Sam2MultiScaleAttention "
        "SamHQVisionAttention SamVisionAttention SegGptAttention TimesformerSelfAttention "
        "UnlimitedOcrSamVisionAttention VitDetAttention qwen2_vl.VisionAttention "
        # timm: channels attend to channels, heads are mixed, or the tokens lie in an order of their own
        "xcit.XCA edgenext.CrossCovarianceAttn davit.ChannelAttentionV2 "
        "cait.TalkingHeadAttn hiera.MaskUnitAttention mvitv2.MultiScaleAttention",
        _davit: "davit.ChannelAttention",
        _global_context: "gcvit.WindowAttentionGlobal",
        grouped(_kv_heads): "Exaone4_5_VisionAttention",
    },
    "qkv_proj": {
        grouped(_kv_heads): "Phi3Attention Phi4MultimodalAttention",
        _codegen: "CodeGenAttention",
        by_heads(_head_dim): "MiniMaxLightningAttention",
    },
    "query_key_value": {
        _falcon: "FalconAttention",
        by_heads(_head_dim): "BloomAttention PersimmonAttention",
        by_heads(_head_size): "GPTNeoXAttention GPTNeoXJapaneseAttention",
    },
    "c_attn": {
        _gpt2: "GPT2Attention DecisionTransformerGPT2Attention ImageGPTAttention",
        thirds: "openai.Attention",
        _gpt_big_code: "GPTBigCodeAttention",
    },
    "wqkv": {thirds: "ModernBertAttention MptAttention", grouped(_kv_heads): "DbrxAttention"},
    "att_proj": {thirds: "BarkSelfAttention"},
    "qkv_linear": {thirds: "LayoutLMv2SelfAttention"},
    "in_proj": {by_heads(lambda m: m.attention_head_size): "deberta.DisentangledSelfAttention"},
    "in_proj_qkv": {
        _gated_delta_net: "Qwen3_5GatedDeltaNet Qwen3_5MoeGatedDeltaNet Qwen4ExpTextGatedDeltaNet"
    },
    "in_proj_qkvz": {_gated_delta_net_by_heads: "Qwen3NextGatedDeltaNet"},
    "to_kv": {
        halves: "EvollaSequenceCompressorAttention GraniteSpeechConformerAttention "
        "GraniteSpeechPlusConformerAttention"
    },
    "kv_proj": {halves: "JetMoeAttention"},
    "gate_up_proj": {_up_gate: "Phi4MultimodalAudioMLP"},
    "proj": {
        _up_gate: "ClvpGatedLinearUnit activations.GEGLU activations.SwiGLU",
        whole_up: "activations.GELU activations.ApproximateGELU activations.LinearActivation",
    },
    "input_linear": {gate_up: "GraniteMoeSharedMLP GraniteMoeHybridMLP GraniteMoeSWAMLP"},
}
FUSED = {
    name: {kind: layout for layout, kinds in rows.items() for kind in kinds.split()}
    for name, rows in _TABLE.items()
}


def layout_of(parent: nn.Module, leaf: str) -> Layout | None:
    """How the weight ``leaf`` of ``parent`` is laid out, where its class is known."""
    known = FUSED.get(leaf, {})
    for kind in type(parent).__mro__:  # another library may have put a subclass in its place
        *_, folder, file = ["", "", *kind.__module__.split(".")]
        for name in (kind.__name__, f"{folder}.{kind.__name__}", f"{file}.{kind.__name__}"):
            if name in known:
                return known[name]
    return None
