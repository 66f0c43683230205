"""What is known of model families by name: roles, fused layouts, output heads, routers.

Tables and the few lines that read them; it looks at names and attributes, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Any

from torch import nn


class Role(StrEnum):
    """What a projection does in its block."""

    QUERY = "query"
    KEY = "key"
    VALUE = "value"
    OUTPUT = "output"
    GATE = "gate"
    UP = "up"
    DOWN = "down"
    OTHER = "other"


Blocks = Sequence[tuple[Role, int]]  # roles and row counts, as they are stored

# -- roles by name ------------------------------------------------------------------------------------

ROLES_BY_NAME = {
    name: role
    for role, names in {
        Role.QUERY: "query q_proj q_lin query_proj q wq to_q q_attn linear_q add_q_proj to_query "
        "query_global projection_query w2e_query e2w_query e2e_query q_a_proj q_b_proj receptance",
        Role.KEY: "key k_proj k_lin key_proj k wk to_k linear_k add_k_proj to_key key_global projection_key",
        Role.VALUE: "value v_proj v_lin value_proj v wv to_v linear_v add_v_proj to_value value_global "
        "projection_value",
        Role.OUTPUT: "o_proj to_add_out",
        Role.GATE: "gate_proj wi_0 w1",
        Role.UP: "up_proj wi_1 wi w3 fc1 lin1 linear1 c_fc dense_h_to_4h intermediate_dense linear_fc1 fc_in "
        "pwconv1 dense1 ffn",
        Role.DOWN: "down_proj wo w2 fc2 lin2 linear2 c_proj dense_4h_to_h output_dense linear_fc2 fc_out "
        "pwconv2 dense2 ffn_output output_linear",
    }.items()
    for name in names.split()
}
# Below an attention, these are its output.
ATTENTION_OUTPUTS = frozenset(
    "out_proj o out_lin wo to_out c_proj dense proj output_proj linear_out projection projection_layer "
    "output post".split()
)
DENSE_ROLES = {"intermediate": Role.UP, "output": Role.DOWN}  # BERT: intermediate.dense, output.dense
FEED_FORWARD = frozenset("mlp ff ffn feed_forward feedforward ff_context densereludense".split())
# Below a feed-forward block: what other names mean there. RWKV calls its two matrices key and value.
FEED_FORWARD_ROLES = {
    "key": Role.UP,
    "value": Role.DOWN,
    "receptance": Role.GATE,
    "proj_in": Role.UP,
    "proj_out": Role.DOWN,
    "net": Role.DOWN,  # diffusers: net.2, behind net.0.proj
}
WRAPPERS = frozenset("linear linear_projection".split())  # q_proj.linear


def role_of(path: str) -> Role:
    """The role that a dotted module path tells by itself."""
    parts = [part for part in path.lower().split(".") if not part.isdigit()] or [path]
    if len(parts) > 1 and parts[-1] in WRAPPERS:
        parts.pop()
    *above, leaf = parts
    block = next((part for part in reversed(above) if part in FEED_FORWARD or "att" in part), "")
    if block in FEED_FORWARD:
        if leaf in FEED_FORWARD_ROLES:
            return FEED_FORWARD_ROLES[leaf]
    elif block:
        if leaf in ATTENTION_OUTPUTS:
            return Role.OUTPUT
        if leaf == "gate_proj":  # on the attention's output
            return Role.OTHER
    if leaf == "dense":
        return DENSE_ROLES.get(above[-1], Role.OTHER) if above else Role.OTHER
    return ROLES_BY_NAME.get(leaf, Role.OTHER)


def in_attention(path: str) -> bool:
    """Does the path go through a module that is called an attention?"""
    return any("att" in part for part in path.lower().split("."))


# -- heads and routers --------------------------------------------------------------------------------

HEADS = frozenset(
    "lm_head classifier pre_classifier score head heads head_dist fc qa_outputs embed_out cls logits "
    "output_layer output_projection proj_out".split()
)
HEADS_ANYWHERE = frozenset("lm_head output_projection".split())  # outside attention
HEAD_LAYERS = 4  # a head has no more linear layers than this, and no attention

# Beside `experts`: what chooses among them. Below an indexer: what chooses tokens, without a gradient.
ROUTERS = frozenset("router gate gating wg shared_expert_gate".split())
INDEXERS = frozenset(["indexer"])

# -- fused weights ------------------------------------------------------------------------------------

QKV = (Role.QUERY, Role.KEY, Role.VALUE)

# Names of weights that hold several projections, and which. What is not in `FUSED` is tried out.
FUSED_NAMES = {
    **dict.fromkeys(
        "c_attn qkv qkv_proj wqkv w_pack in_proj to_qkv query_key_value qkv_linear att_proj in_proj_qkv "
        "in_proj_qkvz".split(),
        QKV,
    ),
    **dict.fromkeys("kv to_kv kv_proj linear_kv".split(), QKV[1:]),
}
LATENT = frozenset("kv_a_proj_with_mqa kv_b_proj".split())  # DeepSeek: key and value from one latent
GATED_NAMES = frozenset("gate_up_proj gate_up".split())


def thirds(parent: Any, rows: int) -> Blocks | None:
    """Query, key and value, of one size."""
    return [(role, rows // 3) for role in QKV]


def halves(parent: Any, rows: int) -> Blocks | None:
    """Key and value, of one size."""
    return [(role, rows // 2) for role in QKV[1:]]


def grouped(kv_rows: Callable[[Any], int]) -> Callable[[Any, int], Blocks | None]:
    """The query, then key and value of ``kv_rows(parent)`` rows each."""

    def blocks(parent: Any, rows: int) -> Blocks | None:
        kv = kv_rows(parent)
        return [(Role.QUERY, rows - 2 * kv), (Role.KEY, kv), (Role.VALUE, kv)]

    return blocks


def by_heads(parent: Any, rows: int) -> Blocks | None:
    """Query, key and value of one head, then of the next: no block of rows is the query's."""
    return None


def _gpt2(parent: Any, rows: int) -> Blocks | None:
    return (halves if getattr(parent, "is_cross_attention", False) else thirds)(parent, rows)


def _gpt_big_code(parent: Any, rows: int) -> Blocks | None:
    if not getattr(parent, "multi_query", False):
        return (halves if getattr(parent, "is_cross_attention", False) else by_heads)(parent, rows)
    return grouped(lambda m: m.kv_dim)(parent, rows)


def _falcon(parent: Any, rows: int) -> Blocks | None:
    if parent.new_decoder_architecture or not parent.multi_query:
        return by_heads(parent, rows)
    return grouped(lambda m: m.head_dim)(parent, rows)


def _gated_delta_net(parent: Any, rows: int) -> Blocks | None:
    return [(Role.QUERY, parent.key_dim), (Role.KEY, parent.key_dim), (Role.VALUE, parent.value_dim)]


def _gate_up(parent: Any, rows: int) -> Blocks | None:
    return [(Role.GATE, rows // 2), (Role.UP, rows // 2)]


def _up_gate(parent: Any, rows: int) -> Blocks | None:
    return [(Role.UP, rows // 2), (Role.GATE, rows // 2)]


def _kv_heads(parent: Any) -> int:
    return parent.num_key_value_heads * parent.head_dim


Layout = Callable[[Any, int], Blocks | None]

# By name of the weight and class of the module that holds it, read in transformers 5.23. A class whose
# name says too little has its folder before it. tests/models/test_divisions.py tries every row.
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
        "UnlimitedOcrSamVisionAttention VitDetAttention qwen2_vl.VisionAttention",
        grouped(_kv_heads): "Exaone4_5_VisionAttention",
    },
    "qkv_proj": {
        grouped(_kv_heads): "Phi3Attention Phi4MultimodalAttention",
        by_heads: "CodeGenAttention MiniMaxLightningAttention",
    },
    "query_key_value": {
        _falcon: "FalconAttention",
        by_heads: "BloomAttention GPTNeoXAttention GPTNeoXJapaneseAttention PersimmonAttention",
    },
    "c_attn": {
        _gpt2: "GPT2Attention DecisionTransformerGPT2Attention ImageGPTAttention",
        thirds: "openai.Attention",
        _gpt_big_code: "GPTBigCodeAttention",
    },
    "wqkv": {thirds: "ModernBertAttention MptAttention", grouped(_kv_heads): "DbrxAttention"},
    "att_proj": {thirds: "BarkSelfAttention"},
    "qkv_linear": {thirds: "LayoutLMv2SelfAttention"},
    "in_proj": {by_heads: "deberta.DisentangledSelfAttention"},
    "in_proj_qkv": {
        _gated_delta_net: "Qwen3_5GatedDeltaNet Qwen3_5MoeGatedDeltaNet Qwen4ExpTextGatedDeltaNet"
    },
    "in_proj_qkvz": {by_heads: "Qwen3NextGatedDeltaNet"},
    "to_kv": {
        halves: "EvollaSequenceCompressorAttention GraniteSpeechConformerAttention "
        "GraniteSpeechPlusConformerAttention"
    },
    "kv_proj": {halves: "JetMoeAttention"},
    "gate_up_proj": {_up_gate: "Phi4MultimodalAudioMLP"},
    "input_linear": {_gate_up: "GraniteMoeSharedMLP GraniteMoeHybridMLP GraniteMoeSWAMLP"},
}
FUSED = {
    name: {kind: layout for layout, kinds in rows.items() for kind in kinds.split()}
    for name, rows in _TABLE.items()
}


def layout_of(parent: nn.Module, leaf: str) -> Layout | None:
    """How the weight ``leaf`` of ``parent`` is laid out, where its class is known."""
    known = FUSED.get(leaf, {})
    for kind in type(parent).__mro__:  # another library may have put a subclass in its place
        folder = kind.__module__.split(".")[-2:-1]
        for name in (kind.__name__, ".".join([*folder, kind.__name__])):
            if name in known:
                return known[name]
    return None


def likely_blocks(parent: nn.Module, leaf: str, rows: int) -> list[Blocks]:
    """What the weight ``leaf`` may hold, by its name and its parent's attributes: to be tried out."""
    roles = FUSED_NAMES[leaf]
    found: list[Blocks] = []
    if rows % len(roles) == 0:
        found.append([(role, rows // len(roles)) for role in roles])
    head = getattr(parent, "head_dim", None)
    for name in ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads", "n_kv_head"):
        heads = getattr(parent, name, None)
        if roles == QKV and isinstance(head, int) and isinstance(heads, int) and rows > 2 * head * heads > 0:
            kv = head * heads
            found.append([(Role.QUERY, rows - 2 * kv), (Role.KEY, kv), (Role.VALUE, kv)])
    return found
