"""A plan, taken to PEFT: its ranks and scalings, and the guide that shows how."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import peft
import pytest

import lowrank
from lowrank import presets
from tests import zoo
from tests.helpers import perturb
from tests.peft_format.common import CONFIG, mixed, warnings_of_peft

pytestmark = warnings_of_peft


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "t5", "phi3"])
def test_a_plan_gives_peft_exactly_its_ranks(family: str) -> None:
    plan = mixed(family)
    model = peft.get_peft_model(
        zoo.build(family), peft.LoraConfig(**plan.to_peft(), fan_in_fan_out=family == "gpt2")
    )
    found = {
        path.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for path, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    wanted: dict[str, tuple[int, float]] = {}
    for p in plan.adapted:
        rank, alpha = wanted.get(p.module, (0, 0.0))
        wanted[p.module] = rank + plan[p].rank, alpha + plan[p].rank * plan[p].scaling
    assert found.keys() == wanted.keys()
    for path, (rank, alpha) in wanted.items():
        assert found[path] == (rank, pytest.approx(alpha / rank, rel=1e-12))


def test_tlora_ranks_in_peft() -> None:
    """What the README shows: only the allocation is taken."""
    batches = [zoo.batch("llama", seed=seed) for seed in (1, 2)]
    plan = lowrank.plan_model(zoo.build("llama"), presets.tlora(rank=3), batches=batches, progress=False)
    model = peft.get_peft_model(zoo.build("llama"), peft.LoraConfig(**plan.to_peft(), task_type="CAUSAL_LM"))
    ranks = {
        path.removeprefix("base_model.model."): module.r["default"]
        for path, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert ranks == {p.module: plan[p].rank for p in plan.adapted}
    assert len(set(ranks.values())) > 1


def test_the_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of docs/peft.md runs, in its order."""
    import transformers

    guide = (Path(__file__).parents[2] / "docs" / "peft.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    assert len(blocks) == 5
    monkeypatch.chdir(tmp_path)
    build = staticmethod(lambda name: zoo.build("llama"))
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", build)
    names: dict[str, Any] = {"batches": [zoo.batch("llama", seed=seed) for seed in (1, 2)]}
    for block in blocks:
        exec(block.replace("...  # train it", "train(model)"), names | {"train": perturb}, names)
    assert (tmp_path / "for-peft" / CONFIG).exists() and (tmp_path / "for-serving" / CONFIG).exists()
    assert lowrank.plan_of(names["model"]).adapted
