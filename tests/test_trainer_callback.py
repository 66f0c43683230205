"""transformers' Trainer: quantized bases, checkpoints that hold all of the adapter, and what it saves."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lowrank
from lowrank import presets
from lowrank.integrations.transformers import AdapterCallback
from lowrank.swapping import restore_adapter
from tests import zoo
from tests.helpers import logits, perturb

with warnings.catch_warnings():  # their own affairs with PyTorch's newest
    warnings.simplefilter("ignore")
    from torchao.quantization import Int8WeightOnlyConfig

expected = pytest.mark.filterwarnings("ignore::lowrank.SavePretrainedWarning")
theirs = pytest.mark.filterwarnings(
    "ignore:.*inputs will be cast from",
    "ignore:.*Enum subclass",
    "ignore:Converting a tensor with requires_grad=True",
)
HIDDEN = {"hidden_size": 64, "intermediate_size": 128}


# -- the models and what they are trained on ---------------------------------------------------------------


def llama(**options: Any) -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**zoo.DECODER, **HIDDEN, **options}))


def mixtral() -> nn.Module:
    return hf.MixtralForCausalLM(hf.MixtralConfig(**zoo.DECODER, num_local_experts=2, num_experts_per_tok=1))


def llava() -> nn.Module:
    vision = hf.CLIPVisionConfig(**zoo.VISION)
    text = hf.LlamaConfig(**zoo.DECODER)
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_id=3, vision_feature_layer=-1)
    return hf.LlavaForConditionalGeneration(config)


class Sentences(torch.utils.data.Dataset):
    """Twelve examples, each its own; with an image of four patches where that is asked for."""

    def __init__(self, images: bool = False) -> None:
        self.images = images

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(i)
        ids = torch.randint(4, zoo.VOCABULARY, (zoo.TOKENS,), generator=draw)
        if not self.images:
            return {"input_ids": ids, "labels": ids}
        ids = torch.cat([torch.full((4,), 3), ids])
        pixels = torch.randn(3, 16, 16, generator=draw)
        return {"input_ids": ids, "labels": ids, "pixel_values": pixels}


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def wrapped(make: Callable[[], nn.Module], preset: Any = presets.lora, **options: Any) -> nn.Module:
    return lowrank.wrap_model(seeded(make), preset(rank=2, **options), progress=False)


def trainer(
    model: nn.Module, folder: Path, *callbacks: Any, images: bool = False, **options: Any
) -> hf.Trainer:
    arguments = hf.TrainingArguments(
        str(folder),
        **{
            "max_steps": 4,
            "learning_rate": 0.05,
            "per_device_train_batch_size": 2,
            "use_cpu": True,
            "report_to": [],
            "save_steps": 2,
            "logging_steps": 1,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            **options,
        },
    )
    return hf.Trainer(model=model, args=arguments, train_dataset=Sentences(images), callbacks=list(callbacks))


def values(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in lowrank.adapter_parameters(model)]


# -- quantized bases ---------------------------------------------------------------------------------------

QUANTIZED = {
    "4 bits": lambda: hf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "8 bits": lambda: hf.BitsAndBytesConfig(load_in_8bit=True),
    "torchao int8": lambda: hf.TorchAoConfig(Int8WeightOnlyConfig()),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    seeded(llama).save_pretrained(folder)
    return folder


def quantized(folder: Path, kind: str) -> nn.Module:
    model = hf.AutoModelForCausalLM.from_pretrained(folder, quantization_config=QUANTIZED[kind]())
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # the same on every machine
    return model


@expected
@theirs
@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_trainer_takes_a_wrapped_quantized_model(kind: str, saved: Path, tmp_path: Path) -> None:
    model = quantized(saved, kind)
    quantizer, settings = model.hf_quantizer, model.config.quantization_config
    with pytest.raises(ValueError, match="purely quantized"):
        trainer(model, tmp_path)
    lowrank.wrap_model(model, presets.lora(rank=2), progress=False)
    before = values(model)
    assert model.is_quantized and isinstance(model.hf_quantizer, type(quantizer))
    run = trainer(copy.deepcopy(model), tmp_path, AdapterCallback())
    run.train()
    after = values(run.model)
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    again = lowrank.load_adapter(quantized(saved, kind), tmp_path / "checkpoint-4")
    assert all(torch.equal(a, b) for a, b in zip(values(again), after, strict=True))
    assert torch.equal(logits(again.eval(), zoo.batch("llama")), logits(run.model.eval(), zoo.batch("llama")))

    lowrank.unwrap(model)
    assert type(model.hf_quantizer) is type(quantizer) and model.config.quantization_config is settings
    with pytest.raises(ValueError, match="purely quantized"):
        trainer(model, tmp_path)


@theirs
def test_the_quantizer_of_another_model_is_not_touched(saved: Path) -> None:
    model, other = quantized(saved, "8 bits"), seeded(llama)
    other.hf_quantizer = model.hf_quantizer
    kind = type(model.hf_quantizer)
    lowrank.wrap_model(model, presets.lora(rank=2), progress=False)
    assert type(other.hf_quantizer) is kind
    assert pickle.loads(pickle.dumps(model.hf_quantizer)).is_qat_trainable


# -- checkpoints ---------------------------------------------------------------------------------------------

MODELS = {"llama": llama, "mixtral": mixtral, "llava": llava}


@expected
@pytest.mark.parametrize("callback", [True, False], ids=["callback", "trainer alone"])
@pytest.mark.parametrize("family", MODELS)
def test_resuming_equals_never_stopping(family: str, callback: bool, tmp_path: Path) -> None:
    callbacks = [AdapterCallback()] if callback else []
    images = family == "llava"
    whole = trainer(wrapped(MODELS[family], presets.pissa), tmp_path, *callbacks, images=images)
    whole.train()
    half = trainer(wrapped(MODELS[family], presets.pissa), tmp_path, *callbacks, images=images)
    half.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    trained = values(whole.model)
    assert all(parameter.any() for parameter in trained)
    assert all(torch.equal(a, b) for a, b in zip(values(half.model), trained, strict=True))
    if callback:
        loaded = lowrank.load_adapter(seeded(MODELS[family]), tmp_path / "checkpoint-4")
        assert all(torch.equal(a, b) for a, b in zip(values(loaded), trained, strict=True))


@expected
@pytest.mark.parametrize("named", [True, False])
def test_the_callback_restores_what_the_trainer_does_not_find(named: bool, tmp_path: Path) -> None:
    """As after a renaming of the tensors: the Trainer's own file holds no adapter here."""
    whole = trainer(wrapped(mixtral), tmp_path / "one", AdapterCallback())
    whole.train()
    checkpoint = tmp_path / "one" / "checkpoint-2"
    weights = checkpoint / "model.safetensors"
    save_file(
        {n: t for n, t in load_file(weights).items() if "lora" not in n and "adapters" not in n}, weights
    )
    if named:
        half = trainer(wrapped(mixtral), tmp_path / "two", AdapterCallback(resume_from=checkpoint))
    else:
        half = trainer(wrapped(mixtral), tmp_path / "one", AdapterCallback())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf.Trainer, "_issue_warnings_after_load", lambda *_: None)
        half.train(resume_from_checkpoint=str(checkpoint))
    assert all(torch.equal(a, b) for a, b in zip(values(half.model), values(whole.model), strict=True))


@expected
def test_a_checkpoint_of_another_run_is_not_restored(tmp_path: Path) -> None:
    trainer(wrapped(llama), tmp_path / "one", AdapterCallback()).train()
    trainer(wrapped(llama), tmp_path / "two", AdapterCallback(), learning_rate=0.01).train()
    run = trainer(wrapped(llama), tmp_path / "two", AdapterCallback())
    with pytest.raises(
        ValueError, match=r"expected the checkpoint of step 2 .*AdapterCallback\(resume_from=folder"
    ):
        run.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-2"))


def test_restoring_keeps_the_tensors(tmp_path: Path) -> None:
    model = perturb(wrapped(llama, presets.pissa, train=("lm_head",)))
    with torch.no_grad():
        model.lm_head.copy.weight.add_(1)
    lowrank.save_adapter(model, tmp_path)
    other = wrapped(llama, presets.pissa, train=("lm_head",))
    tensors = [p for p in other.parameters() if p.requires_grad]
    assert restore_adapter(other, tmp_path) is other
    assert all(
        a is b for a, b in zip(tensors, [p for p in other.parameters() if p.requires_grad], strict=True)
    )
    wanted = model.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in other.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 3}, r"q_proj: Allocation\(rank=2.*expected Allocation\(rank=3"),
        ({"target": ("q_proj", "v_proj")}, "k_proj: Allocation.*expected not adapted"),
        ({"train": ("lm_head",)}, r"trained in full: \[\], expected \['lm_head'\]"),
    ],
)
def test_another_plan_is_not_restored(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    lowrank.save_adapter(wrapped(llama), tmp_path)
    model = lowrank.wrap_model(seeded(llama), presets.lora(**{"rank": 2, **options}), progress=False)
    before = values(model)
    with pytest.raises(lowrank.AdapterError, match=message):
        restore_adapter(model, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(before, values(model), strict=True))


def test_the_callback_asks_for_a_name_before_the_first_step(tmp_path: Path) -> None:
    model = wrapped(llama)
    lowrank.add_adapter(model, presets.lora(rank=2), name="other", progress=False)
    with pytest.raises(ValueError, match="several adapters, so name one of them: default, other"):
        trainer(model, tmp_path, AdapterCallback()).train()
    assert not list(tmp_path.glob("checkpoint-*"))
    with pytest.raises(ValueError, match="the model is not wrapped"):
        trainer(llama(), tmp_path, AdapterCallback()).train()


@expected
def test_a_tied_head_that_is_adapted_is_saved_and_resumed(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return wrapped(lambda: llama(tie_word_embeddings=True), target=("q_proj", "lm_head"))

    whole = trainer(make(), tmp_path)
    whole.train()
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert "model.embed_tokens.weight" in saved and "lm_head.base.weight" not in saved
    assert whole.model._tied_weights_keys == hf.LlamaForCausalLM._tied_weights_keys
    half = trainer(make(), tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf.Trainer, "_issue_warnings_after_load", lambda *_: None)
        half.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert half.model.lm_head.base.weight is half.model.model.embed_tokens.weight
    assert all(torch.equal(a, b) for a, b in zip(values(half.model), values(whole.model), strict=True))


# -- save_pretrained ------------------------------------------------------------------------------------


def test_save_pretrained_of_a_wrapped_model_warns(tmp_path: Path) -> None:
    model = wrapped(mixtral)
    with pytest.warns(
        lowrank.SavePretrainedWarning, match=r"from_pretrained cannot read.*save_adapter.*merge"
    ):
        model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert names == model.state_dict().keys()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(perturb(model)))):
        with pytest.warns(lowrank.SavePretrainedWarning):
            copied.save_pretrained(tmp_path)
        name = next(name for name in names if name.endswith("adapters.default.0.A"))
        assert torch.equal(load_file(tmp_path / "model.safetensors")[name], copied.state_dict()[name])
    lowrank.merge(model).save_pretrained(tmp_path)  # without a warning, which would be an error here
    again = hf.MixtralForCausalLM.from_pretrained(tmp_path).eval()
    batch = zoo.batch("llama")
    torch.testing.assert_close(logits(again, batch), logits(model.eval(), batch), rtol=1e-4, atol=1e-5)
    lowrank.wrap_model(model, presets.lora(rank=2), progress=False)
    lowrank.unwrap(model).save_pretrained(tmp_path)
    assert "save_pretrained" not in vars(model) and "lora" not in json.dumps(model.config.to_dict())


def test_a_wrapped_model_is_freed_at_once() -> None:
    model = wrapped(llama)
    parameter = weakref.ref(model.model.embed_tokens.weight)
    gc.collect()
    gc.disable()
    try:
        del model
        assert parameter() is None
    finally:
        gc.enable()
