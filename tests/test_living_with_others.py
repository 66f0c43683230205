"""A wrapped model among other people's tools: trainers, the compiler, export, dispatch, the meta device."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import lowrank
from lowrank import Policy, presets
from lowrank.layers.trained import TrainedModule
from tests import helpers, zoo
from tests.helpers import perturb

with warnings.catch_warnings():  # it uses what its dependencies have given up
    warnings.simplefilter("ignore")
    import pytorch_lightning as lightning

POLICY = presets.ailora(rank=2, train=("classifier",))


class Sentences(torch.utils.data.Dataset):
    """Eight batches' worth of labelled token ids."""

    def __len__(self) -> int:
        return 8 * zoo.BATCH

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {
            name: tensor[i % zoo.BATCH] for name, tensor in zoo.batch("bert", seed=i // zoo.BATCH).items()
        }


@pytest.fixture(autouse=True)
def a_fresh_accelerator() -> None:
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def loader() -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(Sentences(), batch_size=zoo.BATCH)


def wrapped(family: str = "bert", policy: Policy = POLICY) -> nn.Module:
    return lowrank.wrap_model(zoo.build(family), policy, progress=False)


def logits(model: nn.Module, family: str = "bert") -> Tensor:
    return helpers.logits(model.eval(), zoo.batch(family))


def frozen_base(family: str = "bert") -> Tensor:
    """The frozen base's logits: what a wrapped model gives before its first step."""
    return helpers.frozen_logits(zoo.build(family), zoo.batch(family))


def learnt(model: nn.Module, folder: Path) -> None:
    """Everything that should move has moved, the base has not, and the adapter reloads."""
    before, after = wrapped().state_dict(), model.state_dict()
    assert before.keys() == after.keys()
    own = [name for name in before if ".adapters." in name or ".copies." in name]
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in own if name.rsplit(".", 1)[-1] not in ("A0", "B0")}
    lowrank.save_adapter(model, folder)
    assert torch.equal(logits(lowrank.load_adapter(zoo.build("bert"), folder)), logits(model))
    with lowrank.disable_adapters(model):
        assert torch.equal(logits(model), frozen_base())


# -- trainers -----------------------------------------------------------------------------------------


def trainer(model: nn.Module, folder: Path, **options: Any) -> hf.Trainer:
    arguments = hf.TrainingArguments(
        str(folder),
        max_steps=4,
        learning_rate=0.05,
        per_device_train_batch_size=zoo.BATCH,
        use_cpu=True,
        report_to=[],
        save_steps=2,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    return hf.Trainer(model=model, args=arguments, train_dataset=Sentences())


@pytest.mark.filterwarnings("ignore::lowrank.SavePretrainedWarning")  # at each of its checkpoints
@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}, {"activation_checkpointing": True}],
    ids=["plain", "accumulating", "bf16", "checkpointing"],
)
def test_the_trainer_of_transformers(options: dict[str, Any], tmp_path: Path) -> None:
    run = trainer(wrapped(), tmp_path, **options)
    run.train()
    # Under bf16 the model's forward was exchanged for one that casts.
    learnt(run.accelerator.unwrap_model(run.model, keep_fp32_wrapper=False), tmp_path / "adapter")


@pytest.mark.filterwarnings("ignore::lowrank.SavePretrainedWarning")  # at each of its checkpoints
def test_the_trainer_resumes_from_its_own_checkpoint(tmp_path: Path) -> None:
    whole, half = wrapped(), wrapped()
    trainer(whole, tmp_path).train()
    trainer(half, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    other = half.state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in whole.state_dict().items())


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision: str, tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    model = wrapped()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    prepared, optimizer, batches = accelerator.prepare(model, optimizer, loader())
    for batch in batches:
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(**batch).loss)
            accelerator.clip_grad_norm_([p for p in prepared.parameters() if p.requires_grad], 1.0)
            optimizer.step()
            optimizer.zero_grad()
    learnt(accelerator.unwrap_model(prepared, keep_fp32_wrapper=False), tmp_path)


class Module(lightning.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.05)


@pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*is deprecated:DeprecationWarning"
)
@pytest.mark.filterwarnings("ignore:.*LeafSpec", "ignore:Found .* in eval mode", "ignore:.*logging interval")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning(precision: Any, tmp_path: Path) -> None:
    module = Module(wrapped())
    fit = lightning.Trainer(
        accelerator="cpu",
        precision=precision,
        max_epochs=1,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        default_root_dir=tmp_path,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    fit.fit(module, loader())
    learnt(module.model, tmp_path / "adapter")
    fit.save_checkpoint(tmp_path / "lightning.ckpt")
    saved = torch.load(tmp_path / "lightning.ckpt", weights_only=False)["state_dict"]
    again = Module(wrapped())
    again.load_state_dict(saved)
    assert torch.equal(logits(again.model), logits(module.model))


# -- the compiler, and export -------------------------------------------------------------------------

# PyTorch's own compiler makes an instance of what it says should have none.
compiling = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@compiling
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "torch_encoder"])
def test_compiled_whole_and_once(family: str) -> None:
    """One graph, no break, no recompilation from step to step; the same steps as without."""
    torch.compiler.reset()
    plain, model = (perturb(wrapped(family, presets.pissa(rank=2))) for _ in range(2))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for seed in range(3):
        # Ids alone: what transformers does with masks and losses breaks the graph by itself.
        ids = zoo.batch(family, seed=seed)["input_ids"]
        losses = []
        for run, trained in ((plain, plain), (compiled, model)):
            loss = run(input_ids=ids).logits.square().mean()
            loss.backward()
            with torch.no_grad():
                for parameter in lowrank.adapter_parameters(trained):
                    parameter -= 0.1 * parameter.grad
                    parameter.grad = None
            losses.append(loss.detach())
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1
    assert lowrank.plan_of(compiled) is lowrank.plan_of(model)


@compiling
def test_compiled_code_sees_disabled_adapters(tmp_path: Path) -> None:
    torch.compiler.reset()
    model = perturb(wrapped("perceptron", presets.lora(rank=2)))
    compiled, batch = torch.compile(model, backend="aot_eager"), zoo.batch("perceptron")
    changed = compiled(**batch).logits
    with lowrank.disable_adapters(compiled):
        plain = compiled(**batch).logits
    assert not torch.allclose(changed, plain)
    torch.testing.assert_close(plain, zoo.build("perceptron")(**batch).logits)
    torch.testing.assert_close(compiled(**batch).logits, changed)
    lowrank.save_adapter(compiled, tmp_path)
    torch.testing.assert_close(
        lowrank.load_adapter(zoo.build("perceptron"), tmp_path)(**batch).logits, changed
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own
@pytest.mark.slow
def test_compiled_by_inductor() -> None:
    torch.compiler.reset()
    model, batch = perturb(wrapped("perceptron", presets.pissa(rank=2))), zoo.batch("perceptron")
    wanted = model(**batch)
    wanted.loss.backward()
    gradients = [p.grad.clone() for p in lowrank.adapter_parameters(model)]
    model.zero_grad()
    got = torch.compile(model, fullgraph=True)(**batch)
    got.loss.backward()
    torch.testing.assert_close(got.logits, wanted.logits, rtol=1e-5, atol=1e-6)
    for parameter, gradient in zip(lowrank.adapter_parameters(model), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["bert", "vit", "perceptron", "torch_encoder"])
def test_exported_after_merging(family: str) -> None:
    model = perturb(
        wrapped(family, presets.ailora(rank=2) if family != "perceptron" else presets.lora(rank=2))
    )
    batch = zoo.batch(family)
    batch.pop("labels")
    with torch.no_grad():
        wanted = model(**batch).logits
        program = torch.export.export(lowrank.merge(model), (), dict(batch))
        got = program.module()(**batch).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert not any("adapters" in name or "lora" in name for name in program.state_dict)


# -- bases that are elsewhere -------------------------------------------------------------------------


def dispatched() -> nn.Module:
    """The small BERT with accelerate's hooks on every layer, as a device map leaves it."""
    model = zoo.build("bert")
    parts = [name for name, module in model.named_modules() if not list(module.children())]
    return accelerate.dispatch_model(model, dict.fromkeys(parts, "cpu"), main_device="cpu", force_hooks=True)


def test_a_dispatched_base(tmp_path: Path) -> None:
    model = dispatched()
    assert hasattr(model.bert.encoder.layer[0].attention.self.query, "_hf_hook")
    lowrank.wrap_model(model, POLICY, progress=False)
    assert torch.equal(logits(model), frozen_base())
    for seed in range(2):
        model(**zoo.batch("bert", seed=seed)).loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
    learnt(model, tmp_path)
    trained = logits(model)
    assert torch.equal(logits(lowrank.load_adapter(dispatched(), tmp_path)), trained)
    torch.testing.assert_close(logits(lowrank.merge(model)), trained, rtol=1e-4, atol=1e-5)


class Away(nn.Linear):
    """Computes on a device of its own, as a layer does that a device map has put elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.device))


def test_a_layer_on_another_device_than_its_input() -> None:
    model = nn.Sequential(Away(6, 4), nn.ReLU())
    lowrank.wrap_model(model, presets.lora(rank=2), progress=False)
    assert model.to("meta")(torch.randn(3, 6)).shape == (3, 4)


def test_an_offloaded_base(tmp_path: Path) -> None:
    """accelerate keeps the weights elsewhere, and only for a call they are there."""
    lowrank.save_adapter(perturb(wrapped(policy=presets.lora(rank=2))), tmp_path)
    wanted = logits(lowrank.load_adapter(zoo.build("bert"), tmp_path))
    model = accelerate.cpu_offload(zoo.build("bert"), "cpu")
    assert model.classifier.weight.is_meta
    with pytest.raises(ValueError, match=r"query: Principal.* starts from its values, but it is on the meta"):
        lowrank.wrap_model(model, presets.pissa(rank=2), progress=False)
    lowrank.load_adapter(model, tmp_path)
    assert torch.equal(logits(model), wanted)
    with pytest.raises(ValueError, match="is on the meta device: there is nothing yet"):
        lowrank.merge(model)
    lowrank.unwrap(model)
    lowrank.wrap_model(model, presets.lora(rank=2), progress=False)
    assert torch.equal(logits(model), frozen_base())
    assert {p.device.type for p in lowrank.adapter_parameters(model)} == {"cpu"}


def on_meta(family: str) -> nn.Module:
    with torch.device("meta"):
        model = zoo.FAMILIES[family][0]()
    return model.eval()


def fill(model: nn.Module, family: str) -> nn.Module:
    """Loads the base's own state dict into ``model``, wrapped or not, and its buffers that no dict holds."""
    base = zoo.build(family)
    result = model.load_state_dict(base.state_dict(), strict=False, assign=True)
    assert not result.unexpected_keys
    own = ("adapters.", "lora.", ".copies.")
    assert all(any(part in name for part in own) for name in result.missing_keys)
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                module._buffers[name] = base.get_submodule(path)._buffers[name]
    if hasattr(model, "tie_weights"):
        model.tie_weights()  # assigning separates what was tied
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    return model


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "torch_encoder"])
def test_wrapped_on_the_meta_device_and_loaded_afterwards(family: str, tmp_path: Path) -> None:
    head = {"bert": ("classifier",), "torch_encoder": ("head",)}.get(family, ())
    policy = presets.lora(rank=2, train=head)
    model = lowrank.wrap_model(on_meta(family), policy, progress=False)
    assert all(not p.is_meta for p in lowrank.adapter_parameters(model))
    fill(model, family)
    assert torch.equal(logits(model, family), frozen_base(family))
    usual = wrapped(family, policy)
    for one, other in zip(lowrank.adapter_parameters(model), lowrank.adapter_parameters(usual), strict=True):
        assert torch.equal(one, other), "it starts elsewhere than on a loaded base"
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in usual.parameters()]
    for module in model.modules():
        if isinstance(module, TrainedModule):
            module.copy.weight.data.add_(1)
            assert not torch.equal(module.base.weight, module.copy.weight), "they share their storage"
    lowrank.unwrap(model)
    assert model.state_dict().keys() == zoo.build(family).state_dict().keys()


def test_an_adapter_loaded_before_its_base(tmp_path: Path) -> None:
    model = perturb(wrapped())
    with torch.no_grad():
        model.classifier.copy.bias.add_(1)
    lowrank.save_adapter(model, tmp_path / "ours")
    lowrank.export_peft(model, tmp_path / "peft")
    early = fill(lowrank.load_adapter(on_meta("bert"), tmp_path / "ours"), "bert")
    assert torch.equal(logits(early), logits(model)), "the base's head has taken the place of the trained one"
    early = fill(lowrank.import_peft(on_meta("bert"), tmp_path / "peft"), "bert")
    torch.testing.assert_close(logits(early), logits(model), rtol=1e-5, atol=1e-6)
    assert all(p.requires_grad for p in early.classifier.copy.parameters())


def test_what_starts_from_the_weights_wants_them() -> None:
    for preset in (presets.pissa, presets.milora, presets.olora):
        model = on_meta("llama")
        modules = dict(model.named_modules())
        with pytest.raises(ValueError, match="but it is on the meta device: load the base first"):
            lowrank.wrap_model(model, preset(rank=2), progress=False)
        assert dict(model.named_modules()) == modules
