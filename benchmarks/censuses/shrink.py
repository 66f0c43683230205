"""Small configurations of transformers' model types: every size shrunk by what its name says.

Some sizes must fit together in ways that only a model's code knows: `configs` therefore offers several, and
the first that builds and runs is taken.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

VOCABULARY = 64
WIDTH, WIDER, HEADS, LAYERS, EXPERTS = 32, 48, 4, 2, 4

# The first pattern that matches a name says its size; a larger size than the default's is not taken.
SIZES: list[tuple[str, int]] = [
    (r"(text_|input_|output_|src_|tgt_|^)vocab_size.*", VOCABULARY),
    (r"codebook_size|audio_vocab_size|char_vocab_size|num_embeddings", VOCABULARY),
    (r"num_key_value_heads|num_kv_heads|n_kv_heads|.*_num_key_value_heads|linear_num_key_heads", 2),
    (r".*(num_attention_heads|attention_heads|num_heads|n_heads?|linear_num_value_heads)", HEADS),
    (r"(d_|.*_)?head_dim|d_kv|.*dim_head|mamba_d_head|qk_nope_head_dim|v_head_dim", 8),
    (r"qk_rope_head_dim|rotary_dim", 4),
    (r"qk_head_dim", 12),
    (r"(kv|q|o|decay|gate|value|a|v)_(lora_)?(rank|low_rank_dim)|mla_.*rank", 16),
    (r"num_feat_extract_layers", 99),
    (
        r".*(num_hidden_layers|num_layers|n_layers?|encoder_layers|decoder_layers|depth)$|.*_depth|.*_layers$",
        LAYERS,
    ),
    (r"(num|n)_(local_|routed_|moe_)?experts|.*num_experts|n_routed_experts", EXPERTS),
    (r".*experts_per_tok(en)?|moe_k|top_?k(_experts)?|moe_topk", 2),
    (r"n_groups?|topk_group|num_expert_groups?", 1),
    (
        r".*intermediate_(size|dim)|.*ffn_(hidden_)?(dim|size)|d_ff|mlp_dim|.*feed_?forward_(size|dim|hidden_size)|n_inner",
        WIDER,
    ),
    (r".*linear_units|ff_dim|.*dim_feedforward", WIDER),
    (
        r".*(hidden_size|hidden_dim|embed_dim|d_model|n_embd|projection_dim|project_dim|proj_dim|embedding_size)",
        WIDTH,
    ),
    (
        r"dim|width|emb_dim|embedding_dim|latent_dim|.*_channels?_list|out_hidden_size|.*output_dim|.*proj_size",
        WIDTH,
    ),
    (r".*(max_position_embeddings|n_positions|max_source_positions|max_target_positions|max_seq_len)", 128),
    (r".*sliding_window|attention_window|.*chunk_size|attention_chunk_size", 8),
    (r"num_mel_bins|n_mels", 16),
    (r"image_size|img_size|input_image_size", 64),
    (r"mamba_d_state|ssm_state_size|state_size", 8),
]
KEPT = re.compile(
    r".*(num_channels|in_channels|in_chans|kernel|stride|dilation|tubelet|ratio|factor|levels).*"
)
TOKENS = re.compile(r".*(token_id|token_index|_index|_token)$|(bos|eos|pad|sep|cls|mask|unk)_token_id")
STAGES = ("out_features", "out_indices", "stage_names")
INDICES = ("indexes", "indices", "_layer", "_layers", "_idx")
LISTS = re.compile(r".*(hidden_sizes|dims|embed_dim|channels|embed_dims|conv_dim)$")


def configs(config_class: type) -> Iterator[Any]:
    """Shrunken configurations, the smallest first; each may fail where it is used.

    The default may not build at all: then there is none.
    """
    whole = config_class().to_dict()
    for lists in ("shrunken", "cut", "kept"):
        for widths in (True, False):
            for grouped in (True, False):
                try:
                    yield config_class.from_dict(_small(whole, lists, widths, grouped))
                except Exception:  # whatever a stranger's code raises: the next one may do
                    continue


def _small(config: dict[str, Any], lists: str, widths: bool, grouped: bool) -> dict[str, Any]:
    """``grouped``: fewer key heads than heads; ``cut``: what has an entry for each layer has fewer, too."""
    layers, before = _layers(config), _depth(config)
    made = {}
    for name, value in config.items():
        if name in STAGES:  # of layers that are not there
            continue
        if name in ("id2label", "label2id"):
            made[name] = value
            continue
        if isinstance(value, dict) and value and all(str(key).isdigit() for key in value):  # by layer
            made[name] = {key: held for key, held in value.items() if int(key) < layers}
            continue
        if isinstance(value, dict) and name not in ("rope_parameters", "rope_scaling"):
            made[name] = _small(value, lists, widths, grouped)
            continue
        if isinstance(value, (list, tuple)) and lists == "cut" and len(value) == before:
            value = list(value)[:layers]
        elif isinstance(value, (list, tuple)) and lists == "cut" and name.endswith(INDICES):
            value = [i for i in value if i < layers] or [0]
        made[name] = _value(name, value, widths, lists == "shrunken", layers)
        if not grouped and "key_value_heads" in name and isinstance(value, int):
            made[name] = HEADS if widths else value
    for name, value in made.items():
        if isinstance(value, list) and name in ("layer_types", "mlp_layer_types", "layers_block_type"):
            made[name] = _kinds(value, layers)
    if "first_k_dense_replace" in made:
        made["first_k_dense_replace"] = 1
    if isinstance(made.get("rope_parameters"), dict) or made.get("rope_scaling"):
        made = {name: value for name, value in made.items() if name != "rope_scaling"}
    return made


def _depth(config: dict[str, Any]) -> int:
    said = [config.get(name) for name in ("num_hidden_layers", "num_layers", "n_layer", "depth")]
    return next((number for number in said if isinstance(number, int)), 0)


def _layers(config: dict[str, Any]) -> int:
    """As many layers as there are kinds of them, two at least."""
    kinds = config.get("layer_types") or config.get("layers_block_type") or ()
    return max(LAYERS, len(set(kinds)))


def _kinds(value: list[Any], layers: int) -> list[Any]:
    kinds = list(dict.fromkeys(value))
    return (kinds + value)[:layers]


def _value(name: str, value: Any, widths: bool, lists: bool, layers: int) -> Any:
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return _number(name, value, widths, layers)
    if isinstance(value, (list, tuple)) and value and all(type(each) is int for each in value):
        if TOKENS.fullmatch(name):
            return [min(each, VOCABULARY - 1) for each in value]
        if not lists:
            return value
        if name == "depths":
            return [1] * len(value)
        if LISTS.fullmatch(name):
            least = min(value)
            return [max(8, WIDTH * each // least // 2) for each in value]
    return value


def _number(name: str, value: int, widths: bool, layers: int) -> int:
    if TOKENS.fullmatch(name):
        return min(value, VOCABULARY - 1 - (hash_of(name) % 8)) if value >= VOCABULARY else value
    if KEPT.fullmatch(name):
        return value
    for pattern, size in SIZES:
        if re.fullmatch(pattern, name):
            if size in (WIDTH, WIDER, HEADS) and not widths:
                return value
            if name.endswith("num_hidden_layers"):
                size = layers
            return min(value, size)
    return value


def hash_of(name: str) -> int:
    """A small number that tells names apart, the same in every process."""
    return sum(map(ord, name))
