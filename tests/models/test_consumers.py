"""Roles by who consumes whose output: blocks whose names say nothing, of many kinds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowrank
from lowrank import plan_model, presets
from lowrank.models.families import Role

WIDTH, HEADS, HEAD = 32, 4, 8


def softmax_by_hand(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * HEAD**-0.5
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return torch.einsum("bhqk,bhkd->bhqd", weights / weights.sum(-1, keepdim=True), v)


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def rotated(x: Tensor) -> Tensor:
    angles = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] / torch.arange(1, HEAD // 2 + 1)
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)


class Attention(nn.Module):
    """``a``, ``b``, ``c`` and ``d`` are query, key, value and output, held in another order than that."""

    def __init__(
        self,
        product: Callable[..., Tensor] = sdpa,
        *,
        kv_heads: int = HEADS,
        context: int = WIDTH,
        causal: bool = False,
        prepare: Callable[[Tensor], Tensor] = lambda x: x,
        gate: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.d, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(context, kv_heads * HEAD)
        self.c, self.a = nn.Linear(context, kv_heads * HEAD), nn.Linear(WIDTH, WIDTH)
        self.product, self.causal, self.prepare, self.gate = product, causal, prepare, gate
        if gate:
            self.e = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        from_ = x if context is None else context
        q, k, v = (
            y.unflatten(-1, (-1, HEAD)).transpose(1, 2) for y in (self.a(x), self.b(from_), self.c(from_))
        )
        k, v = (y.repeat_interleave(HEADS // y.shape[1], 1) for y in (k, v))
        y = self.product(self.prepare(q), self.prepare(k), v, self.causal).transpose(1, 2).flatten(2)
        return x + self.d(y * self.gate(self.e(x)) if self.gate else y)


def roles(block: nn.Module) -> dict[str, str]:
    """By the path in ``block``; of a fused weight the roles of its blocks, in their order."""
    found: dict[str, str] = {}
    for p in lowrank.find_projections(nn.ModuleDict({"block": block})):
        name = p.module.removeprefix("block.")
        found[name] = f"{found[name]} {p.role.value}" if name in found else p.role.value
    return found


def own(kind: type) -> Any:
    """A class of its own: a trial is made once for each."""
    return type(kind.__name__, (kind,), {})


ABCD = {"a": "query", "b": "key", "c": "value", "d": "output"}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"causal": True},
        {"kv_heads": 2},
        {"kv_heads": 1, "causal": True},
        {"context": 16},
        {"prepare": rotated},
        {"prepare": lambda x: F.normalize(x, dim=-1)},
    ],
    ids=["plain", "causal", "grouped", "causal, one key", "across", "rotated", "normalized"],
)
@pytest.mark.parametrize("product", [sdpa, softmax_by_hand])
def test_an_attention_without_names(product: Any, settings: Any) -> None:
    assert roles(own(Attention)(product, **settings)) == ABCD


@pytest.mark.parametrize("gate", [torch.sigmoid, F.silu])
def test_a_gate_on_the_attentions_output_has_no_role(gate: Any) -> None:
    assert roles(own(Attention)(gate=gate)) == ABCD | {"e": "other"}


def test_what_attends_without_a_softmax_has_no_role() -> None:
    def linear(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        return F.elu(q).add(1) @ (F.elu(k).add(1).mT @ v)

    assert set(roles(own(Attention)(linear)).values()) == {"other"}


def test_a_layer_that_holds_all_in_one_module() -> None:
    class Layer(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.g, self.h = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH), nn.Linear(WIDTH, 48)
            self.norm = nn.LayerNorm(WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            z = self.norm(y)
            return y + self.g(self.f(z) * F.silu(self.h(z)))

    assert roles(Layer()) == ABCD | {"f": "up", "g": "down", "h": "gate"}


def test_parts_that_lie_in_modules_of_their_own() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x, self.y, self.z = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, t: Tensor) -> Tensor:
            v, q, k = (y.unflatten(-1, (-1, HEAD)).transpose(1, 2) for y in (self.x(t), self.y(t), self.z(t)))
            return sdpa(q, k, v, False).transpose(1, 2).flatten(2)

    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads, self.last = Heads(), nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1))

        def forward(self, t: Tensor) -> Tensor:
            return self.last(self.heads(t))

    wanted = {"heads.x": "value", "heads.y": "query", "heads.z": "key", "last.0": "output"}
    assert roles(Mixing()) == wanted


@pytest.mark.parametrize("interleaved", [True, False])
def test_a_fused_weight_without_a_name(interleaved: bool) -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            if interleaved:
                v, q, k = y.unflatten(-1, (HEADS, 3, HEAD)).unbind(-2)
            else:
                v, q, k = (each.unflatten(-1, (HEADS, HEAD)) for each in y.chunk(3, -1))
            return self.second(
                sdpa(*(t.transpose(1, 2) for t in (q, k, v)), False).transpose(1, 2).flatten(2)
            )

    assert roles(Fused()) == {"first": "value query key", "second": "output"}
    rows = {p.role: p.rows for p in lowrank.find_projections(nn.ModuleDict({"block": Fused()}))}
    assert rows[Role.QUERY] == ((8, 88, 8, 24) if interleaved else (32, 64))


def test_a_parallel_layer_has_an_output_of_attention_and_feed_forward() -> None:
    """As in Flux: one weight for query, key, value and up, one for what comes out of both."""

    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(WIDTH, 3 * WIDTH + 64), nn.Linear(WIDTH + 64, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            *parts, up = self.one(x).split([WIDTH, WIDTH, WIDTH, 64], -1)
            q, k, v = (each.unflatten(-1, (HEADS, HEAD)).transpose(1, 2) for each in parts)
            return self.two(torch.cat([sdpa(q, k, v, False).transpose(1, 2).flatten(2), F.gelu(up)], -1))

    assert roles(Parallel()) == {"one": "query key value other", "two": "other"}


@pytest.mark.parametrize("activation", [F.silu, F.gelu, torch.sigmoid, torch.relu])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("names", [("fc1", "fc2"), ("north", "south")])
def test_gate_and_up_in_one_weight(names: tuple[str, str], first: bool, activation: Any) -> None:
    """A GLU: the halves are told by which goes through the activation, also where a name says "up"."""

    class GLU(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(names[0], nn.Linear(WIDTH, 96))
            self.add_module(names[1], nn.Linear(48, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.get_submodule(names[0])(x).chunk(2, -1)
            return self.get_submodule(names[1])(activation(a) * b if first else a * activation(b))

    assert roles(GLU()) == {names[0]: "gate up" if first else "up gate", names[1]: "down"}


def test_a_mixer_of_tokens_is_no_attention() -> None:
    """Its layers act on other tokens, too, and in proportion or not, as a key and a value do."""

    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.t1, self.t2 = nn.Linear(6, 12), nn.Linear(12, 6)
            self.c1, self.c2 = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.t2(F.gelu(self.t1(x.mT))).mT
            return x + self.c2(F.gelu(self.c1(x)))

    assert set(roles(Mixer()).values()) <= {"up", "down", "other"}


def test_a_block_that_cannot_be_called_shows_nothing_and_can_be_told() -> None:
    class Needy(Attention):
        def forward(self, x: Tensor, *, cache: Any) -> Tensor:  # type: ignore[override]
            return super().forward(cache.prepare(x))

    model = nn.ModuleDict({"block": Needy()})
    assert {p.role for p in lowrank.find_projections(model)} == {Role.OTHER}
    told = presets.lora(rank=2, target="query", roles={"block.a": "query"})
    assert [p.module for p in plan_model(model, told)] == ["block.a"]
    plan = plan_model(model, presets.lora(rank=2, target=("query", "b"), roles={"block.a": "query"}))
    assert any("role is not known: give it with roles={pattern: role}" in note for note in plan.notes)


def test_inference_mode_and_a_half_precision_base() -> None:
    with torch.inference_mode():
        assert roles(own(Attention)()) == ABCD
    assert roles(own(Attention)().to(torch.bfloat16)) == ABCD
    assert set(roles(own(Attention)().to("meta")).values()) == {"other"}, "it has no numbers to try"


def test_names_of_a_query_leave_no_other_layer_to_be_one() -> None:
    """A layer that makes keys of positions is none."""

    class Relative(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj, self.mystery = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
            self.last = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            k = self.k_proj(x) + self.mystery(x.roll(1, 1))
            return self.last((self.q_proj(x) @ k.mT).softmax(-1) @ self.v_proj(x))

    wanted = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "mystery": "other", "last": "output"}
    assert roles(Relative()) == wanted


def table_of_pairs(side: int) -> Tensor:
    """Relative places of the tokens of an image, as windows have them."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    places = torch.stack([y.flatten(), x.flatten()])
    dy, dx = places[:, :, None] - places[:, None] + side - 1
    return dy * (2 * side - 1) + dx


class Window(nn.Module):
    """timm's window attention: a fused weight, and a bias for each pair of a window's tokens."""

    def __init__(self, side: int, *, read: bool = False) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.table = nn.Parameter(torch.zeros((2 * side - 1) ** 2, HEADS))
        self.register_buffer("relative_position_index", table_of_pairs(side), persistent=False)
        self.read = read

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = F.linear(x, self.qkv.weight, bias=None) if self.read else self.qkv(x)
        q, k, v = y.unflatten(-1, (3, HEADS, HEAD)).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT + self.table[self.relative_position_index].permute(2, 0, 1)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


QKVO = {"qkv": "query key value", "proj": "output"}


@pytest.mark.parametrize("read", [True, False])
@pytest.mark.parametrize("side", [3, 7])
def test_a_window_of_an_image(side: int, read: bool) -> None:
    """Its number of tokens is told by its table; BEiT multiplies by the layer's weight and calls no layer."""
    assert roles(own(Window)(side, read=read)) == QKVO


def test_keys_of_a_reduced_image() -> None:
    """As in PVT and Twins: the sides of the image are arguments, and a convolution makes it smaller."""

    class Reduced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            self.kv = nn.Linear(WIDTH, 2 * WIDTH)
            self.sr, self.norm = nn.Conv2d(WIDTH, WIDTH, 4, stride=4), nn.LayerNorm(WIDTH)

        def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
            small = self.sr(x.mT.unflatten(-1, size)).flatten(2).mT
            q = self.q(x).unflatten(-1, (HEADS, HEAD)).transpose(1, 2)
            k, v = self.kv(self.norm(small)).unflatten(-1, (2, HEADS, HEAD)).permute(2, 0, 3, 1, 4)
            return self.proj(sdpa(q, k, v, False).transpose(1, 2).flatten(2))

    assert roles(Reduced()) == {"q": "query", "kv": "key value", "proj": "output"}


def test_attention_in_an_image_with_positions_that_the_query_sees() -> None:
    """As in SAM: the query is multiplied with positions, too."""

    class Image(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
            self.positions = nn.Parameter(torch.zeros(16, HEAD))

        def forward(self, x: Tensor) -> Tensor:
            _, height, width, _ = x.shape
            q, k, v = self.qkv(x.flatten(1, 2)).unflatten(-1, (3, HEADS, HEAD)).permute(2, 0, 3, 1, 4)
            scores = q @ k.mT + q @ self.positions[: height * width].mT
            return self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2).view(x.shape))

    assert roles(Image()) == QKVO


def test_gated_blocks_of_vision_models() -> None:
    """Before the down, as in EVA; and three layers, as in ViTamin."""

    class GLU(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.norm, self.fc2 = nn.Linear(WIDTH, 96), nn.LayerNorm(48), nn.Linear(48, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            up, gate = self.fc1(x).chunk(2, -1)
            return self.fc2(self.norm(up * F.silu(gate)))

    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w0, self.w1, self.w2 = nn.Linear(WIDTH, 48), nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.w2(F.gelu(self.w0(x)) * self.w1(x))

    class Narrow(nn.Module):
        """Moshi: the layer behind the product need not narrow."""

        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(WIDTH, 48), nn.Linear(24, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            gate, up = self.fc1(x).unflatten(-1, (2, -1)).unbind(-2)
            return self.fc2(F.silu(gate) * up)

    assert roles(Narrow()) == {"fc1": "gate up", "fc2": "down"}
    assert roles(GLU()) == {"fc1": "up gate", "fc2": "down"}
    assert roles(Three()) == {"w0": "gate", "w1": "up", "w2": "down"}, "w1 is a gate in other models"


def test_a_feed_forward_block_whose_layers_lie_in_modules_of_their_own() -> None:
    """As in SuperGlue: what its name says holds for both."""
    inner = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU())
    block = nn.ModuleDict({"mlp": nn.ModuleList([inner, nn.Linear(8, 4)])})
    assert roles(block) == {"mlp.0.0": "up", "mlp.1": "down"}
    apart = nn.ModuleDict({"mlp": nn.ModuleList([nn.Sequential(nn.Linear(8, 6)), nn.Linear(8, 4)])})
    assert set(roles(apart).values()) == {"other"}, "one does not fit the other"
