"""Fused weights: every layout in the table is tried on the family's own code; others are told by trial."""

from __future__ import annotations

import importlib
import inspect
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
from lowrank.adapters import adapters_of
from lowrank.linalg.rows import pieces
from lowrank.models.layouts import FUSED, QKV, layout_of
from lowrank.models.projections import Role, find_projections, scan
from lowrank.models.targets import select
from tests.helpers import frozen_logits, numbers, perturb
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
    """``output(by)``, ``(tokens, width)`` of ``attention`` where ``by`` is added to its layer ``leaf``."""
    (name,) = [each for each, _ in attention.named_children() if each.lower() == leaf]
    layer, moved = attention.get_submodule(name), {"by": torch.zeros(())}

    def move(module: nn.Module, args: Any, y: Tensor) -> Tensor:
        padded = y.reshape(-1, y.shape[-1]).clone()  # to whole windows, behind the tokens
        padded[:TOKENS] += moved["by"]
        return padded.view(y.shape)

    layer.register_forward_hook(move)
    width = layer.weight.shape[0 if hasattr(layer, "nf") else 1]
    wanted = list(inspect.signature(attention.forward).parameters)
    x = torch.randn(TOKENS, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(
        layer.weight
    )
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


def moved(rows: list[int], width: int, token: int) -> Tensor:
    """A move of these rows at one token: ``(tokens, width)``."""
    by = torch.zeros(TOKENS, width, dtype=torch.float64)
    by[token, rows] = 3.0 * (-1.0) ** torch.arange(len(rows)).double()
    return by


def assert_acts_as(role: Role, rows: list[int], width: int, output: Callable[..., Tensor]) -> None:
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


# Of timm: see test_timm.py.
TIMM = {
    kind
    for kind in FUSED["qkv"]
    if kind.partition(".")[0] in "xcit edgenext davit cait hiera mvitv2 gcvit".split()
}
# What the token test cannot see: see the tests of their own below.
ELSEWHERE = {
    *TIMM,
    "Florence2VisionChannelAttention",
    "MiniMaxLightningAttention",
    *FUSED["gate_up_proj"],
    *FUSED["input_linear"],
    *FUSED["proj"],
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
    ("FalconAttention", "query_key_value", {"new_decoder_architecture": True, "num_kv_heads": 1}),
    ("FalconAttention", "query_key_value", {"new_decoder_architecture": True, "num_kv_heads": HEADS}),
    ("CodeGenAttention", "qkv_proj", {"num_attention_heads": 8, "rotary_dim": 4}),
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
    assert sorted(row for _, own in blocks for row in numbers(own)) == list(range(rows))
    for role, own in blocks:
        if role == Role.OTHER:  # what gates the output, which is taken out here
            continue
        assert_acts_as(role, numbers(own), rows, output)
        for row in {row for block in pieces(own) for row in (block[0], block[1] - 1)}:
            assert_acts_as(role, [row], rows, output)


INTERLEAVED = [
    (kind, leaf, sizes)
    for kind, leaf, sizes in [*ROWS, *VARIANTS, ("MiniMaxLightningAttention", "qkv_proj", {})]
    if kind.startswith(("Bloom", "GPTNeoX", "Persimmon", "CodeGen", "MiniMax", "deberta", "Qwen3Next"))
    or (kind == "FalconAttention" and sizes.get("num_kv_heads", 2) > 1 and not sizes.get("multi_query"))
    or (kind == "GPTBigCodeAttention" and not sizes)
]


@pytest.mark.parametrize(("kind", "leaf", "sizes"), INTERLEAVED)
def test_without_its_query_rows_an_attention_does_not_see_its_key_rows(
    kind: str, leaf: str, sizes: dict[str, Any]
) -> None:
    attention = family_module(kind, **sizes)
    rows = {
        p.role: numbers(p.rows) for p in find_projections(nn.ModuleDict({"a": attention})) if leaf in p.module
    }
    assert all(
        pieces(p.rows)[1:] for p in find_projections(nn.ModuleDict({"a": attention})) if leaf in p.module
    )
    layer, output = attention.get_submodule(leaf), called(attention, kind, leaf)
    by = moved(rows[K], layer_rows(layer), 0)
    assert (output(by) - output()).abs().max() > 1e-3
    for name, parameter in attention.named_parameters():
        if name.startswith((f"{leaf}.", "q_bias", "q_layernorm.bias")):
            parameter.data[rows[Q] if name.startswith(leaf) else ...] = 0
    torch.testing.assert_close(output(by), output(), rtol=0, atol=1e-12)


def test_lightning_attention_keeps_query_key_and_value_head_by_head() -> None:
    """Each value row reaches one column of the heads' outputs, of its own token and later ones."""
    kind = "MiniMaxLightningAttention"
    attention = family_module(kind)
    attention.act_fn, attention.norm = nn.Identity(), nn.Identity()
    attention.out_proj.weight.data.copy_(torch.eye(WIDTH))
    output, rows = called(attention, kind, "qkv_proj"), 3 * WIDTH
    blocks = FUSED["qkv_proj"][kind](attention, rows)
    assert sorted(row for _, own in blocks for row in numbers(own)) == list(range(rows))
    still = output()
    for role, own in blocks:
        for column, row in enumerate(numbers(own)):
            change = (output(moved([row], rows, 1)) - still).abs() > 1e-9
            tokens, columns = change.any(1).nonzero().flatten(), change.any(0).nonzero().flatten()
            head = column // HEAD * HEAD
            assert tokens.tolist() == ([1] if role == Q else list(range(1, TOKENS)))
            assert columns.tolist() == ([column] if role == V else list(range(head, head + HEAD)))


def test_channel_attention_keeps_query_key_and_value_in_thirds() -> None:
    """Florence-2 attends between channels: scores are ``qᵀk`` over tokens, softmax is over k's channels."""
    kind = "Florence2VisionChannelAttention"
    attention = family_module(kind)
    width = attention.dim
    thirds = [(role, (i * width, (i + 1) * width)) for i, role in enumerate(QKV)]
    assert FUSED["qkv"][kind](attention, 3 * width) == thirds
    output = called(attention, kind, "qkv")

    def by(third: int, value: Tensor) -> Tensor:
        whole = torch.zeros(TOKENS, 3 * width, dtype=torch.float64)
        whole[:, third * width : (third + 1) * width] = value
        return whole

    still, each = (
        output(),
        torch.randn(TOKENS, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2)),
    )
    torch.testing.assert_close(
        output(by(1, each)), still
    )  # the same for all of k's channels: softmax does not see it
    assert (output(by(0, each)) - still).abs().max() > 1e-2 * still.abs().max()
    change = output(by(2, each)) - still
    torch.testing.assert_close(output(by(2, 2 * each)) - still, 2 * change)


@pytest.mark.parametrize(
    ("kind", "leaf"), [(kind, leaf) for leaf in ("gate_up_proj", "input_linear") for kind in FUSED[leaf]]
)
def test_gate_and_up_are_told_apart(kind: str, leaf: str) -> None:
    """The up rows act in proportion; the gate's pass an activation."""
    block = family_module(kind)
    if hasattr(block, "layer_norm"):
        block.layer_norm = nn.Identity()
    rows = block.get_submodule(leaf).out_features
    blocks, output = FUSED[leaf][kind](block, rows), called(block, kind, leaf)
    assert {role for role, _ in blocks} == {Role.GATE, Role.UP}
    for role, own in blocks:
        by, still = moved(numbers(own), rows, 0), output()
        change = output(by) - still
        share = float((output(2 * by) - still - 2 * change).abs().max() / change.abs().max())
        assert share < 1e-10 if role == Role.UP else share > 1e-2


# -- code that no table knows: tried out ----------------------------------------------------------------


class Homemade(nn.Module):
    """Attention with a fused weight, whose output ``split`` divides into q, k, v ``(…, heads · HEAD)``."""

    def __init__(
        self, split: Callable[..., Any], rows: int = 3 * WIDTH, causal: bool = True, **told: int
    ) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, rows), nn.LazyLinear(WIDTH)
        self.split, self.causal = split, causal
        vars(self).update(told)
        self(torch.zeros(1, 1, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (-1, HEAD)).transpose(1, 2) for t in self.split(self.qkv(x)))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=True)
        return self.proj(y.transpose(1, 2).flatten(2))


def by_head(y: Tensor) -> list[Tensor]:
    return [t.flatten(-2) for t in y.unflatten(-1, (HEADS, 3 * HEAD)).split(HEAD, -1)]


def by_key_head(y: Tensor) -> list[Tensor]:
    """Three heads of the query, then the key and the value that they share, twice, as in InternLM 2."""
    return [t.flatten(-2) for t in y.unflatten(-1, (2, 6 * HEAD)).split([4 * HEAD, HEAD, HEAD], -1)]


def key_first(y: Tensor) -> tuple[Tensor, ...]:
    k, q, v = y.chunk(3, -1)
    return q, k, v


def grouped_thirds(y: Tensor) -> tuple[Tensor, ...]:
    return y.split([6 * HEAD, 3 * HEAD, 3 * HEAD], -1)


THIRDS = [(Q, (0, 32)), (K, (32, 64)), (V, (64, 96))]
BY_HEAD = [(role, (i * HEAD, 72 + (i + 1) * HEAD, HEAD, 3 * HEAD)) for i, role in enumerate(QKV)]
BY_KEY_HEAD = [(Q, (0, 80, 32, 48)), (K, (32, 88, 8, 48)), (V, (40, 96, 8, 48))]
WHOLE = [(Role.OTHER, (0, 96))]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("split", "wanted"),
    [
        (lambda y: y.chunk(3, -1), THIRDS),
        (by_head, BY_HEAD),
        (by_key_head, BY_KEY_HEAD),
        (key_first, [(K, (0, 32)), (Q, (32, 64)), (V, (64, 96))]),
        (grouped_thirds, [(Q, (0, 48)), (K, (48, 72)), (V, (72, 96))]),
    ],
)
def test_an_unknown_attention_is_divided_as_it_computes(split: Any, wanted: Any, causal: bool) -> None:
    """All have 96 rows on 32 inputs: the shape tells nothing."""
    model = nn.Sequential(type(f"Attention{split.__name__}", (Homemade,), {})(split, causal=causal))
    found = {p: doubt for p, doubt in scan(model).items() if p.module == "0.qkv"}
    assert [(p.role, p.rows) for p in found] == wanted
    assert not any(found.values())


def test_a_fused_weight_that_shows_nothing_is_whole() -> None:
    """Without a softmax there is no query."""

    class Linear(Homemade):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.split(self.qkv(x))
            return self.proj(q @ (k.mT @ v))

    (whole, doubt), *_ = scan(nn.Sequential(Linear(lambda y: y.chunk(3, -1)))).items()
    assert (whole.role, whole.rows) == WHOLE[0] and doubt is not None


def test_interleaved_rows_can_be_told() -> None:
    class Unseen(Homemade):
        """It takes what no trial gives it."""

        def forward(self, x: Tensor, *, needed: bool = False) -> Tensor:
            return super().forward(x) if needed or x.shape == (1, 1, WIDTH) else x.no_such_thing

    model = nn.Sequential(Unseen(by_key_head))
    message = '"value": rows}}, .* interleaved, add "groups": the number of groups'
    with pytest.raises(ValueError, match=message):
        select(model, "query")
    told = {"qkv": {"groups": 2, "query": 32, "key": 8, "value": 8}}
    assert [(p.role, p.rows) for p in select(model, QKV, fused=told).projections] == BY_KEY_HEAD
    assert Policy.from_json(Policy(fused=told).to_json()).fused == told
    for groups in (0, -2, 3):
        with pytest.raises(ValueError, match="must add up, groups times, to the 96 rows"):
            select(model, QKV, fused={"qkv": {**told["qkv"], "groups": groups}})
    with pytest.raises(ValueError, match="must add up, groups times, to the 96 rows"):
        select(model, QKV, fused={"qkv": {"groups": 2}})


def test_trying_changes_nothing() -> None:
    class Counting(Homemade):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.norm, self.calls = nn.BatchNorm1d(WIDTH), 0
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls = getattr(self, "calls", 0) + 1
            if hasattr(self, "seen"):
                self.seen += 1
                self.qkv.weight.data.mul_(2)
                x = self.norm(x.transpose(1, 2)).transpose(1, 2) + F.dropout(x)
            return super().forward(x)

    model = nn.Sequential(Counting(lambda y: y.chunk(3, -1))).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model[0].qkv.register_forward_hook(lambda *args: pytest.fail("a hook was called"))
    calls, state = model[0].calls, torch.get_rng_state()
    scan(model)
    assert model[0].calls == calls and model.training and model[0].norm.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(p.grad is not None for p in model.parameters())


def test_a_weight_on_the_meta_device_is_not_tried() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.ModuleDict({"attn": nn.ModuleDict({"qkv": nn.Linear(8, 24)})}))
    (doubt,) = scan(model).values()
    assert doubt is not None and doubt.adaptable and doubt.roles == set(QKV)


# -- which way a weight is read -------------------------------------------------------------------------


class Subclass(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class SubclassWithBias(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Declared(nn.Module):
    """``x @ W`` or ``x @ Wᵀ``, with the attributes of a Linear or of a Conv1D."""

    def __init__(self, columns: int, rows: int, transposed: bool, conv1d: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(columns, rows) if transposed else torch.randn(rows, columns))
        self.bias, self.transposed = nn.Parameter(torch.randn(rows)), transposed
        vars(self).update({"nf": rows} if conv1d else {"in_features": columns, "out_features": rows})

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight if self.transposed else self.weight.T) + self.bias


LAYERS = [
    Subclass(6, 6),
    SubclassWithBias(6, 6),
    *(
        Declared(6, rows, transposed, conv1d)
        for rows in (6, 4)
        for transposed in (True, False)
        for conv1d in (True, False)
    ),
]


@pytest.mark.parametrize(
    "layer", LAYERS, ids=lambda layer: f"{type(layer).__name__}{tuple(layer.weight.shape)}"
)
def test_a_weight_is_read_as_its_layer_multiplies(layer: Any) -> None:
    model = nn.Sequential(layer, nn.Linear(layer.bias.numel(), 3))
    p, _ = find_projections(model)
    x = torch.eye(p.in_features)
    torch.testing.assert_close(p.weight(model).T, layer(x) - layer(0 * x))
    wrapped = wrap_model(model, presets.pissa(rank=2, target=p.module), progress=False)
    perturb(wrapped)
    (adapted,) = adapted_layers(wrapped).values()
    torch.testing.assert_close(adapted(x) - layer(x), adapted.delta_weight().T)


# -- whole models -----------------------------------------------------------------------------------------


def text(vocabulary: int = 64) -> dict[str, Tensor]:
    return {"input_ids": torch.arange(14).view(2, 7) % vocabulary}


def test_deberta_v1_adapts_its_interleaved_weight_by_role() -> None:
    config = transformers.DebertaConfig(**ENCODER, relative_attention=True, pos_att_type=["c2p", "p2c"])
    model = transformers.DebertaForSequenceClassification(config).eval()
    with pytest.raises(
        ValueError, match="in_proj: DisentangledSelfAttention interleaves.*leave it out of fused"
    ):
        select(model, "query", fused={"in_proj": {"query": 32, "key": 32, "value": 32}})
    plan = plan_model(model, Policy(rank=2))
    assert [(p.role, p.rows) for p in plan if p.module.endswith("in_proj")] == BY_HEAD * 2
    assert not any("in_proj" in note for note in plan.notes)
    before = frozen_logits(model, text())
    wrap_model(model, presets.ailora(rank=2), progress=False)
    assert {p.role for p in adapters_of(model)} == {Q, V}
    assert torch.equal(frozen_logits(model, text()), before)


def test_a_state_space_block_is_no_attention() -> None:
    """FalconMamba is no Falcon: default LoRA adapts its ``in_proj``, which holds no query."""
    config = transformers.FalconMambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)
    model = transformers.FalconMambaForCausalLM(config).eval()
    plan = plan_model(model, Policy(rank=2))
    assert [p.role for p in plan if p.module.endswith("in_proj")] == [Role.OTHER] * 2
    assert not any("in_proj" in note for note in plan.notes)
    assert select(model, "all-linear", fused={"in_proj": {"other": 128}}).projections


def test_stage_changes_are_thirds_of_the_output_width() -> None:
    """SAM 2 widens inside an attention: 3·64 rows on 32 inputs."""
    block = family_module("Sam2MultiScaleAttention")
    block.qkv = nn.Linear(32, 192)
    found = [(p.role, p.rows) for p in find_projections(nn.Sequential(block)) if p.module == "0.qkv"]
    assert found == [(Q, (0, 64)), (K, (64, 128)), (V, (128, 192))]


def test_phi_reads_its_blocks_from_its_heads() -> None:
    model = transformers.Phi3ForCausalLM(transformers.Phi3Config(**DECODER)).eval()
    found = [(p.role, p.rows) for p in select(model, ["query", "key", "value"]).projections][:3]
    assert found == [(Q, (0, 32)), (K, (32, 48)), (V, (48, 64))]
    before = frozen_logits(model, text())
    wrap_model(model, presets.ailora(rank=2), progress=False)
    assert torch.equal(frozen_logits(model, text()), before)


# -- what `fused=` says -------------------------------------------------------------------------------------


def two_widths() -> nn.Module:
    def block(width: int) -> nn.Module:
        return nn.ModuleDict({"attn": nn.ModuleDict({"qkv": nn.Linear(width, 3 * width)})})

    return nn.ModuleDict({"stages": nn.ModuleList([block(8), block(16)])})


def test_the_error_spells_a_pattern_that_fits() -> None:
    with pytest.raises(
        ValueError, match=r'give them with fused=\{"0.attn.qkv": \{"query": rows, "key": rows'
    ) as raised:
        select(two_widths(), "query")
    assert "exclude=('qkv',)" in str(raised.value)
    with pytest.raises(ValueError, match="must add up to the 48 rows of stages.1.attn.qkv; a longer pattern"):
        select(two_widths(), "query", fused={"qkv": {"query": 8, "key": 8, "value": 8}})


def test_of_several_patterns_the_longest_counts() -> None:
    small, large = ({"query": n, "key": n, "value": n} for n in (8, 16))
    for fused in (
        {"0.attn.qkv": small, "1.attn.qkv": large},
        {"qkv": small, "1.attn.qkv": large},
        {"1.attn.qkv": large, "qkv": small},
    ):
        found = select(two_widths(), "query", fused=fused).projections
        assert [p.shape for p in found] == [(8, 8), (16, 16)]
