"""Statistics of experts against a plain loop over them, whatever form their products take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank import Policy
from lowrank.calibration import calibrate
from lowrank.models.projections import Projection
from lowrank.models.targets import select
from lowrank.wrapping.sharing import shared_experts
from tests.helpers import numbers
from tests.layers.test_experts import TRANSPOSED, build

ALL = ("covariance", "moment", "sensitivity", "gradient")
NAMES = ["qwen3_moe", "gpt_oss", "llama4"]
LENGTHS = (12, 5, 9)


def model_of(name: str) -> tuple[nn.Module, str]:
    """In fp64, and the path of its experts. The bias of a GPT-OSS is drawn too."""
    model = build(name, "eager").double()
    for key, parameter in model.named_parameters():
        if key.endswith("_bias"):
            nn.init.normal_(parameter, std=0.1)
    return model, f"model.layers.0.{'feed_forward' if name == 'llama4' else 'mlp'}.experts"


def examples() -> list[dict[str, Tensor]]:
    made = []
    for i, length in enumerate(LENGTHS):
        ids = torch.randint(3, 60, (1, length), generator=torch.Generator().manual_seed(i))
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()})
    return made


def padded(alone: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    fills, longest = {"input_ids": 0, "attention_mask": 0, "labels": -100}, max(LENGTHS)
    return {
        key: torch.cat([nn.functional.pad(e[key], (0, longest - e[key].shape[1]), value=fill) for e in alone])
        for key, fill in fills.items()
    }


def read(name: str, model: nn.Module, path: str, example: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """What each expert reads of an example: its tokens, and what the second product gets of them."""
    seen: dict[str, Any] = {}
    experts = model.get_submodule(path)
    hooks = [experts.register_forward_pre_hook(lambda m, args: seen.update(args=args))]
    if name == "llama4":
        router = model.get_submodule(path.replace("experts", "router"))
        hooks.append(router.register_forward_hook(lambda m, args, out: seen.update(logits=out[1])))
    with torch.no_grad():
        model(**example)
    for hook in hooks:
        hook.remove()
    found = []
    for e in range(4):
        up = experts.gate_up_proj[e].detach()
        if name == "llama4":
            own = seen["logits"].argmax(-1) == e
            x = seen["args"][0].view(4, -1, 32)[e][own]
            gate, other = (x @ up).chunk(2, -1)
            second = other * experts.act_fn(gate)
        else:
            x = seen["args"][0][(seen["args"][1] == e).any(-1)]
            if name == "gpt_oss":
                second = experts._apply_gate(x @ up + experts.gate_up_proj_bias[e].detach())
            else:
                gate, other = (x @ up.T).chunk(2, -1)
                second = experts.act_fn(gate) * other
        found.append({"gate_up_proj": x, "down_proj": second})
    return found


def wanted(name: str, projections: list[Projection]) -> dict[Projection, dict[str, Any]]:
    model, path = model_of(name)
    alone = examples()
    inputs = [read(name, model, path, example) for example in alone]
    model.requires_grad_()
    slopes: list[dict[str, Tensor]] = []
    for example in alone:
        model.zero_grad()
        model(**example).loss.backward()
        own = model.get_submodule(path)._parameters
        grads = {param: own[param].grad.clone() for param in ("gate_up_proj", "down_proj")}
        slopes.append({param: each.mT if name in TRANSPOSED else each for param, each in grads.items()})
    found = {}
    for p in projections:
        weight = model.get_submodule(path)._parameters[p.param].detach()
        weight = weight.mT if name in TRANSPOSED else weight
        out = weight.shape[1]
        experts = range(4) if p.shared > 1 else [p.rows[0] // out]
        rows = [row % out for row in numbers(p.rows)]
        x = [torch.cat([each[e][p.param] for e in experts]) for each in inputs]
        tokens = torch.cat(x)
        centred = [each - each.mean(0) for each in x if len(each)]
        each_gradient = [sum(slope[p.param][e][rows] for e in experts) for slope in slopes]
        found[p] = {
            "covariance": sum(each.T @ each for each in centred) / len(alone),
            "moment": tokens.T @ tokens / len(tokens),
            "gradient": sum(each_gradient) / len(alone),
            "sensitivity": sum(float((weight[experts[0]][rows] * g).abs().mean()) for g in each_gradient)
            / len(alone),
        }
    return found


def check(name: str, projections: list[Projection], needs: tuple[str, ...]) -> None:
    expected = wanted(name, projections)
    for batches in (examples(), [padded(examples())]):
        model, _ = model_of(name)
        got = calibrate(model, projections, needs, batches, progress=False)
        for p in projections:
            for kind in needs:
                value = getattr(got[p], kind)
                torch.testing.assert_close(
                    torch.as_tensor(value).double(),
                    torch.as_tensor(expected[p][kind]).double(),
                    rtol=1e-6,
                    atol=1e-10,
                    msg=f"{p.name}: {kind}",
                )


@pytest.mark.parametrize("name", NAMES)
def test_each_expert_is_measured_on_its_own_tokens(name: str) -> None:
    model, path = model_of(name)
    projections = [p for p in select(model, "experts.*").projections if p.module == path]
    assert len(projections) == 12
    check(name, projections, ALL)


@pytest.mark.parametrize("name", NAMES)
def test_what_experts_share_is_measured_on_the_tokens_of_all(name: str) -> None:
    model, path = model_of(name)
    each = [p for p in select(model, "experts.*").projections if p.module == path]
    projections, _ = shared_experts(model, each, Policy(experts="shared"))
    assert len(projections) == 3
    check(name, projections, ("covariance", "moment", "gradient"))


def test_dbrx_is_measured_through_the_module_above() -> None:
    model = build("dbrx").double()
    projections = select(model, "experts.*").projections
    assert len(projections) == 12
    got = calibrate(model, projections, ("moment", "gradient"), examples(), progress=False)
    model.requires_grad_()
    for example in examples():
        (model(**example).loss / len(LENGTHS)).backward()
    mlp = model.transformer.blocks[0].ffn.experts.mlp
    for p in projections:
        e = int(p.block.split(".")[0])
        gradient = mlp._parameters[p.param].grad.view(4, 48, 32)[e]
        wanted = gradient.T if p.param == "w2" else gradient
        largest = float(wanted.abs().max())  # DBRX rotates in fp32
        torch.testing.assert_close(got[p].gradient, wanted, rtol=1e-4, atol=1e-4 * largest)
        assert got[p].moment.any()


def test_the_weights_are_the_models_own_again() -> None:
    model, path = model_of("gpt_oss")
    experts = model.get_submodule(path)
    before = dict(experts._parameters)
    calibrate(model, select(model, "experts.*").projections, ALL, examples(), progress=False)
    assert all(experts._parameters[name] is parameter for name, parameter in before.items())
