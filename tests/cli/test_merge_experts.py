"""`lowrank merge` into checkpoints that hold experts in one tensor, or each in tensors of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lowrank
from lowrank import presets
from lowrank_cli import main
from tests.helpers import perturb
from tests.zoo import DECODER

hf = pytest.importorskip("transformers")

EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
MODELS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "mixtral": (hf.MixtralForCausalLM, EXPERTS, "block_sparse_moe.experts.3.w1.weight"),
    "qwen3_moe": (
        hf.Qwen3MoeForCausalLM,
        dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
        "mlp.experts.3.gate_proj.weight",
    ),
    # Transposed, gate and up row by row in turn; a square down_proj.
    "gpt_oss": (
        hf.GptOssForCausalLM,
        {**EXPERTS, "head_dim": 8, "intermediate_size": 32, "num_experts_per_tok": 2},
        "mlp.experts.gate_up_proj",
    ),
    "llama4": (
        hf.Llama4ForCausalLM,
        {**EXPERTS, "head_dim": 8, "intermediate_size_mlp": 48, "moe_layers": [0], "rope_scaling": None},
        "feed_forward.experts.gate_up_proj",
    ),
}  # fmt: skip
PRESETS = {
    "each": lambda: presets.lora(rank=2, target=("experts.*", "query")),
    "shared": lambda: presets.lora(rank=2, target=("experts.*", "query"), experts="shared"),
    "anchored": lambda: presets.pissa(rank=2, target=("experts.*", "query")),
}


@pytest.fixture(scope="module", params=MODELS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model, sizes, name = MODELS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    config = model.config_class(**{**DECODER, "num_hidden_layers": 1, **sizes})
    model(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="16kB")
    held = {key for file in folder.glob("*.safetensors") for key in load_file(file)}
    assert any(key.endswith(name) for key in held), "the checkpoint is as the test means it"
    return folder


def load(folder: Path) -> nn.Module:
    return hf.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def call(*arguments: object) -> int:
    return main([str(each) for each in arguments])


@pytest.mark.parametrize("preset", PRESETS)
def test_it_gives_what_merging_in_memory_gives(base: Path, tmp_path: Path, preset: str) -> None:
    model = perturb(lowrank.wrap_model(load(base), PRESETS[preset](), progress=False))
    lowrank.save_adapter(model, tmp_path / "adapter")
    adapted = {f"{p.module}.{p.param}" for p in lowrank.plan_of(model)}
    assert call("merge", base, tmp_path / "adapter", "--out", tmp_path / "merged", "--quiet") == 0
    expected, plain = lowrank.merge(model).state_dict(), load(base).state_dict()
    got = load(tmp_path / "merged").state_dict()
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-2, atol=1e-6)  # one step of bf16
        assert torch.equal(got[name], plain[name]) == (name not in adapted)
    stacks = [name for name in adapted if plain[name].dim() == 3]
    assert len(stacks) == 2
    for name in stacks:
        assert all(not torch.equal(a, b) for a, b in zip(got[name], plain[name], strict=True))


@pytest.mark.parametrize("preset", ["each", "shared"])
def test_another_base_is_refused_by_the_expert_and_nothing_is_written(
    base: Path, tmp_path: Path, preset: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = perturb(lowrank.wrap_model(load(base), PRESETS[preset](), progress=False))
    lowrank.save_adapter(model, tmp_path / "adapter")
    other = load(base)
    with torch.no_grad():
        (experts,) = (m for m in other.modules() if isinstance(getattr(m, "down_proj", None), nn.Parameter))
        experts.down_proj[2] += 0.1
    other.save_pretrained(tmp_path / "other")
    assert call("merge", tmp_path / "other", tmp_path / "adapter", "--out", tmp_path / "merged") == 2
    said = capsys.readouterr().err
    assert "its weights differ by" in said and ("down_proj[2]" in said or "experts.2." in said)
    assert not (tmp_path / "merged").exists()


class Flat(nn.Module):
    """Experts as DBRX keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.moe_num_experts = 3
        for name in ("w1", "v1", "w2"):
            self.register_parameter(name, nn.Parameter(torch.randn(3 * 5, 8)))


@pytest.mark.parametrize("experts", ["each", "shared"])
def test_experts_in_two_dimensions(tmp_path: Path, experts: str) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"mlp": Flat(), "q_proj": nn.Linear(8, 8)})
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base/model.safetensors")
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    perturb(lowrank.wrap_model(model, presets.lora(rank=2, experts=experts), progress=False))
    lowrank.save_adapter(model, tmp_path / "adapter")
    assert (
        call("merge", tmp_path / "base", tmp_path / "adapter", "--out", tmp_path / "merged", "--quiet") == 0
    )
    got = load_file(tmp_path / "merged/model.safetensors")
    for name, tensor in lowrank.merge(model).state_dict().items():
        torch.testing.assert_close(got[name], tensor)
        assert torch.equal(tensor, plain[name]) == (name == "q_proj.bias")


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj = (nn.Parameter(torch.randn(3, *each)) for each in ((5, 8), (8, 5)))
        self.is_transposed = False


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({"experts.0.linear.weight": (5, 8)}, "experts.up_proj, and none of a single expert by a known name"),
        ({"experts.up_proj": (2, 5, 8), "experts.down_proj": (2, 8, 5)}, "up_proj: expected 3 experts"),
        ({"experts.up_proj": (3, 5, 7), "experts.down_proj": (3, 7, 5)}, "expected experts with 8 columns"),
        ({f"experts.{e}.up_proj.weight": (6, 8) for e in range(3)}, "expected the shape (5, 8), got (6, 8)"),
        (
            {f"experts.{e}.up_proj.weight": (5, 8) for e in (1, 2)},
            "the checkpoint has no tensor experts.up_proj",
        ),
    ],
)
def test_what_is_held_otherwise_is_refused_before_anything_is_written(
    tmp_path: Path, held: dict[str, tuple[int, ...]], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "base").mkdir()
    tensors = {name: torch.zeros(shape) for name, shape in held.items()}
    save_file({**tensors, "q_proj.weight": torch.zeros(8, 8)}, tmp_path / "base/model.safetensors")
    model = nn.ModuleDict({"experts": Stack(), "q_proj": nn.Linear(8, 8)})
    perturb(lowrank.wrap_model(model, presets.lora(rank=2, target="experts"), progress=False))
    lowrank.save_adapter(model, tmp_path / "adapter")
    assert call("merge", tmp_path / "base", tmp_path / "adapter", "--out", tmp_path / "merged") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
