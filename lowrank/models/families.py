"""What is known of model families by name: roles, output heads, routers; fused weights are in `layouts`.

Tables and the few lines that read them; it looks at names and attributes, and changes nothing.
"""

from __future__ import annotations

from enum import StrEnum


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
    EMBEDDING = "embedding"  # these two are adapted only where they are asked for
    CONV = "conv"


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
