"""What is known of model families by name: roles, output heads, routers; fused weights are in `layouts`.

Tables and the few lines that read them; it looks at names and attributes, and changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
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
        "projection_query q_a_proj q_b_proj receptance queries",
        Role.KEY: "key k_proj k_lin key_proj k wk to_k linear_k add_k_proj to_key projection_key",
        Role.VALUE: "value v_proj v_lin value_proj v wv to_v linear_v add_v_proj to_value projection_value",
        Role.OUTPUT: "o_proj to_add_out",
        Role.GATE: "gate_proj wi_0 w1",
        Role.UP: "up_proj wi_1 wi w3 fc1 lin1 linear1 c_fc dense_h_to_4h intermediate_dense linear_fc1 fc_in "
        "pwconv1 dense1 ffn proj_mlp",
        Role.DOWN: "down_proj wo w2 fc2 lin2 linear2 c_proj dense_4h_to_h output_dense linear_fc2 fc_out "
        "pwconv2 dense2 ffn_output output_linear",
    }.items()
    for name in names.split()
}
UNSURE = frozenset(["w1"])  # a gate beside w3, an up beside w0
# Below an attention, these are its output.
ATTENTION_OUTPUTS = frozenset(
    "out_proj o out_lin wo to_out c_proj dense proj output_proj linear_out projection projection_layer "
    "output post final".split()
)
# Below a feed-forward block: what other names mean there. RWKV calls its two matrices key and value.
FEED_FORWARD_ROLES = {
    "key": Role.UP,
    "value": Role.DOWN,
    "receptance": Role.GATE,
    "net": Role.DOWN,  # diffusers: net.2, behind net.0.proj
    "w_0": Role.GATE,  # CPM-Ant, as wi_0 in T5
    "w_1": Role.UP,
}
WRAPPERS = frozenset("linear linear_projection".split())  # q_proj.linear

# What the words of a longer name say: layout_query, values_text_proj, w_out. One role, and nothing else.
ATTENTION_WORDS = {
    **dict.fromkeys("q query queries".split(), Role.QUERY),
    **dict.fromkeys("k key keys".split(), Role.KEY),
    **dict.fromkeys("v value values".split(), Role.VALUE),
    **dict.fromkeys("o out output post".split(), Role.OUTPUT),
}
FEED_FORWARD_WORDS = {
    **dict.fromkeys("up in 1".split(), Role.UP),
    **dict.fromkeys("down out output 2".split(), Role.DOWN),
}
DENSE_WORDS = {  # BERT: intermediate.dense, output.dense; Reformer: dense.dense
    **dict.fromkeys("intermediate inter dense".split(), Role.UP),
    "output": Role.DOWN,
}
DIRECTIONS = {"up": Role.UP, "down": Role.DOWN}
# Beside a role's word: a position's, a gate's or a convolution's weight, or what makes weights.
NO_ROLE = frozenset("relative rel pos position conv sconv weight weights bias offset offsets".split())
FEED_FORWARD = re.compile(r"(^|_)(mlps?|ffn?s?|ffw|feed_?forward|densereludense)(_|\d|$)")


def role_of(path: str, *, attends: bool = False) -> Role:
    """The role that a dotted module path tells by itself.

    Args:
        attends: it lies in an attention, whatever that is called.
    """
    parts = [part for part in path.lower().split(".") if not part.isdigit()] or [path]
    if len(parts) > 1 and parts[-1] in WRAPPERS:
        parts.pop()
    *above, leaf = parts
    block = next((part for part in reversed(above) if FEED_FORWARD.search(part) or "att" in part), "")
    feeds = bool(FEED_FORWARD.search(block)) and "att" not in block and not attends
    attends = attends or "att" in block
    if feeds and leaf in FEED_FORWARD_ROLES:
        return FEED_FORWARD_ROLES[leaf]
    if attends and leaf in ATTENTION_OUTPUTS:
        return Role.OUTPUT
    if attends and leaf == "gate_proj":  # on the attention's output
        return Role.OTHER
    if leaf == "dense":
        return _said_by(above[-1], DENSE_WORDS) if above else Role.OTHER
    if leaf in ROLES_BY_NAME:
        return ROLES_BY_NAME[leaf]
    return _said_by(leaf, ATTENTION_WORDS if attends else FEED_FORWARD_WORDS if feeds else DIRECTIONS)


def _said_by(name: str, words: Mapping[str, Role]) -> Role:
    """The one role that the words and numbers of ``name`` say; `Role.OTHER` where they say none, or two."""
    held = re.findall(r"[a-z]+|\d+", name)
    roles = {words[word] for word in held if word in words}
    gates = "gate" in held and Role.QUERY not in roles  # a query may hold its gate, too
    return roles.pop() if len(roles) == 1 and not gates and NO_ROLE.isdisjoint(held) else Role.OTHER


def is_feed_forward(name: str) -> bool:
    return bool(FEED_FORWARD.search(name.lower()))


def is_named(path: str) -> bool:
    """Is the name itself known, and not only words of it?"""
    name = path.rpartition(".")[2].lower()
    return name in ROLES_BY_NAME and name not in UNSURE


def in_attention(path: str) -> bool:
    """Does the path go through a module that is called an attention?"""
    return any("att" in part for part in path.lower().split("."))


def is_attention(children: Iterable[str]) -> bool:
    """Does a module whose ``children`` are called so hold the key and the value of an attention?"""
    roles = {ROLES_BY_NAME.get(name.lower()) for name in children}
    return {Role.KEY, Role.VALUE} <= roles or (Role.QUERY in roles and "to_kv" in children)


# -- heads and routers --------------------------------------------------------------------------------

HEADS = frozenset(
    "lm_head classifier pre_classifier score head heads head_dist fc qa_outputs embed_out cls logits "
    "output_layer output_projection proj_out".split()
)
HEADS_ANYWHERE = re.compile(
    r"(.+_)?lm_heads?|output_projection|(ctc|bpe|wp|char|score)_head"
)  # not in attention
SCORES = frozenset(["head"])  # one anywhere, where it has as many rows as there are words
HEAD_LAYERS = 4  # a head has no more linear layers than this, and no attention

# Beside `experts`, and a router anywhere: what chooses among them.
# Below an indexer: what chooses tokens, without a gradient.
ROUTERS = frozenset("router gate gating wg shared_expert_gate".split())
INDEXERS = frozenset(["indexer"])
