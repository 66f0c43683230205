"""Another base is noticed: by adapters, also in what is not adapted, and by statistics."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import lowrank
from lowrank import Statistics, presets
from lowrank.calibration.source import Source
from lowrank.formats.folder import CONFIG, checksum
from lowrank.models.fingerprint import Sample, difference, of_tensor
from tests import zoo
from tests.helpers import logits, perturb


def save(family: str, folder: Path, **options: Any) -> nn.Module:
    model = lowrank.wrap_model(zoo.build(family), presets.lora(rank=2, **options), progress=False)
    lowrank.save_adapter(perturb(model), folder)
    return model


def change(path: str, index: Any) -> Callable[[nn.Module], None]:
    def act(model: nn.Module) -> None:
        with torch.no_grad():
            model.get_parameter(path)[index] += 1e-3

    return act


def resize(model: nn.Module) -> None:
    model.resize_token_embeddings(zoo.VOCABULARY + 8)


def rescale_buffer(model: nn.Module) -> None:
    model[1].running_mean += 1.0


OTHERS: dict[str, tuple[str, Callable[[nn.Module], None], str]] = {
    "head": ("bert", change("classifier.weight", ...), "classifier.weight: its weights differ"),
    "bias of an adapted layer": (
        "bert",
        change("bert.encoder.layer.0.attention.self.query.bias", ...),
        "query.bias",
    ),
    "norm": ("llama", change("model.norm.weight", ...), "model.norm.weight: its weights differ"),
    "last row of the embedding": (
        "gpt2",
        change("transformer.wte.weight", -1),
        "wte.weight: its weights differ",
    ),
    "vocabulary": ("llama", resize, r"embed_tokens.weight: expected the shape \(64, 32\), got \(72, 32\)"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_base_with_another_rest_is_refused(case: str, tmp_path: Path) -> None:
    family, act, message = OTHERS[case]
    save(family, tmp_path)
    other = zoo.build(family)
    act(other)
    modules = dict(other.named_modules())
    with pytest.raises(lowrank.AdapterError, match=message) as raised:
        lowrank.load_adapter(other, tmp_path)
    assert 'base="other"' in str(raised.value)
    assert dict(other.named_modules()) == modules
    assert lowrank.load_adapter(other, tmp_path, base="other") is other
    assert lowrank.load_adapter(zoo.build(family), tmp_path)


def test_a_buffer_is_compared_too(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6)).eval()

    model = lowrank.wrap_model(build(), presets.lora(rank=2), progress=False)
    lowrank.save_adapter(model, tmp_path)
    other = build()
    rescale_buffer(other)
    with pytest.raises(lowrank.AdapterError, match="1.running_mean: its weights differ"):
        lowrank.load_adapter(other, tmp_path)


def test_a_head_that_was_drawn_again_is_named_alone(tmp_path: Path) -> None:
    save("bert", tmp_path)
    other = zoo.build("bert")
    nn.init.normal_(other.classifier.weight, std=0.02)
    with pytest.raises(lowrank.AdapterError) as raised:
        lowrank.load_adapter(other, tmp_path)
    assert [line.split(":")[0].strip() for line in str(raised.value).splitlines()[1:]] == [
        "classifier.weight"
    ]


def test_a_redrawn_row_of_a_resized_embedding(tmp_path: Path) -> None:
    """New rows lie close to the mean of the old ones, so two draws of them differ by little."""

    def resized(seed: int) -> nn.Module:
        model = zoo.build("llama")
        torch.manual_seed(seed)
        resize(model)
        return model

    model = lowrank.wrap_model(resized(1), presets.lora(rank=2), progress=False)
    lowrank.save_adapter(model, tmp_path)
    with pytest.raises(lowrank.AdapterError, match="embed_tokens.weight: its weights differ"):
        lowrank.load_adapter(resized(2), tmp_path)
    assert lowrank.load_adapter(resized(1), tmp_path)


def test_a_module_trained_in_full_may_differ(tmp_path: Path) -> None:
    model = save("bert", tmp_path, train=("classifier",))
    other = zoo.build("bert")
    nn.init.normal_(other.classifier.weight)
    lowrank.load_adapter(other, tmp_path)
    assert torch.equal(logits(other, zoo.batch("bert")), logits(model, zoo.batch("bert")))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("family", ["bert", "gpt2", "mixtral", "torch_encoder", "vit"])
def test_another_precision_is_the_same_base(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    save(family, tmp_path)
    assert lowrank.load_adapter(zoo.build(family, dtype), tmp_path)
    model = lowrank.wrap_model(zoo.build(family, dtype), presets.lora(rank=2), progress=False)
    lowrank.save_adapter(model, tmp_path)
    assert lowrank.load_adapter(zoo.build(family, dtype), tmp_path) and lowrank.load_adapter(
        zoo.build(family), tmp_path
    )


def test_a_folder_from_before_has_no_samples_of_the_rest(tmp_path: Path) -> None:
    save("bert", tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    del config["rest"]
    config["checksum"] = checksum(config)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    other = zoo.build("bert")
    nn.init.normal_(other.classifier.weight)
    assert lowrank.load_adapter(other, tmp_path)


def test_other_weights_can_be_asked_for(tmp_path: Path) -> None:
    save("bert", tmp_path)
    with pytest.raises(lowrank.AdapterError, match='made for a base with other weights.*base="other"'):
        lowrank.load_adapter(zoo.build("bert", seed=1), tmp_path)
    assert lowrank.load_adapter(zoo.build("bert", seed=1), tmp_path, base="other")
    with pytest.raises(lowrank.AdapterError, match="made for another base"):
        lowrank.load_adapter(zoo.build("roberta"), tmp_path, base="other")
    with pytest.raises(ValueError, match='expected base="same" or base="other", got \'any\''):
        lowrank.load_adapter(zoo.build("bert"), tmp_path, base="any")


def test_meta_weights_are_compared_by_shape(tmp_path: Path) -> None:
    save("bert", tmp_path)
    assert lowrank.load_adapter(zoo.build("bert").to("meta"), tmp_path)
    larger = zoo.build("bert").to("meta")
    larger.classifier = nn.Linear(32, 3, device="meta")
    with pytest.raises(
        lowrank.AdapterError, match=r"classifier.weight: expected the shape \(2, 32\), got \(3, 32\)"
    ):
        lowrank.load_adapter(larger, tmp_path)


def test_parameters_that_train_and_are_not_saved_are_named(tmp_path: Path) -> None:
    model = lowrank.wrap_model(zoo.build("bert"), presets.lora(rank=2), progress=False)
    model.classifier.requires_grad_(True)
    with pytest.warns(
        UserWarning, match="not saved with the adapter: classifier.weight, classifier.bias; name"
    ):
        lowrank.save_adapter(model, tmp_path)


def test_the_samples_are_small(tmp_path: Path) -> None:
    save("mixtral", tmp_path)
    rest = json.loads((tmp_path / CONFIG).read_text())["rest"]
    names = {name for name, _ in zoo.build("mixtral").named_parameters()}
    assert rest.keys() <= names and {"lm_head.weight", "model.embed_tokens.weight"} <= rest.keys()
    assert all(len(json.dumps(said)) < 300 for said in rest.values())


# -- heads that nothing trains ------------------------------------------------------------------------


def saved_encoder(folder: Path) -> Path:
    hf.BertModel(hf.BertConfig(**zoo.ENCODER)).save_pretrained(folder)
    return folder


def test_a_new_head_that_stays_frozen_is_named(tmp_path: Path) -> None:
    model = hf.BertForSequenceClassification.from_pretrained(saved_encoder(tmp_path))
    with pytest.warns(lowrank.FrozenHeadWarning, match=r"^classifier: not in the .*train=\['classifier'\]"):
        lowrank.wrap_model(model, presets.lora(rank=2), progress=False)


def test_heads_that_are_trained_adapted_or_read_are_not(tmp_path: Path) -> None:
    """Warnings are errors here."""
    folder = saved_encoder(tmp_path / "encoder")
    for policy in (
        presets.lora(rank=2, train=("classifier",)),
        presets.lora(rank=2, target=("query", "classifier")),
    ):
        model = hf.BertForSequenceClassification.from_pretrained(folder)
        lowrank.wrap_model(model, policy, progress=False)
    model = hf.BertForSequenceClassification.from_pretrained(folder)
    model.save_pretrained(tmp_path / "whole")
    model = hf.BertForSequenceClassification.from_pretrained(tmp_path / "whole")
    lowrank.wrap_model(model, presets.lora(rank=2), progress=False)


# -- one tensor ---------------------------------------------------------------------------------------


def quantized(values: list[float]) -> Sample:
    return Sample("Params4bit of uint8", (len(values),), torch.tensor(values, dtype=torch.float64))


def test_quantized_values_need_not_be_the_same_bits() -> None:
    """One step of the quantization off in one of 64 values, as another device may round it."""
    values = torch.linspace(-1, 1, 64).tolist()
    moved = [values[0] * 1.15, *values[1:]]
    assert difference(quantized(moved), quantized(values)) is None
    assert difference(quantized([-value for value in values]), quantized(values))
    plain = Sample("float32", (64,), torch.tensor(values, dtype=torch.float64))
    assert difference(Sample("float32", (64,), torch.tensor(moved, dtype=torch.float64)), plain)


def test_infinite_values_are_equal_to_themselves() -> None:
    layer = nn.Module()
    layer.register_buffer("mask", torch.tensor([0.0, -torch.inf, torch.nan]))
    sample = of_tensor(layer, "mask")
    assert (
        sample is not None
        and difference(sample, Sample.from_json(json.loads(json.dumps(sample.to_json())))) is None
    )
    layer.mask[0] = 1.0
    assert difference(of_tensor(layer, "mask"), sample)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_samples_survive_json(dtype: torch.dtype) -> None:
    for scale in (1e-6, 1.0, 1e4):
        layer = nn.Linear(257, 3).to(dtype)
        with torch.no_grad():
            layer.weight.mul_(scale)
        sample = of_tensor(layer, "weight")
        assert sample is not None and sample.values is not None and len(sample.values) == 12
        again = Sample.from_json(json.loads(json.dumps(sample.to_json())))
        assert difference(sample, again) is None and torch.equal(sample.values.float(), again.values.float())


# -- statistics ---------------------------------------------------------------------------------------


@pytest.fixture
def measured() -> Statistics:
    return lowrank.measure(zoo.build("llama"), presets.tlora(rank=2), [zoo.batch("llama")], progress=False)


def test_statistics_of_another_model_are_refused(measured: Statistics, tmp_path: Path) -> None:
    measured.save(tmp_path / "statistics")
    for statistics in (measured, Statistics.load(tmp_path / "statistics"), Statistics({}).merged(measured)):
        with pytest.raises(ValueError, match=r"measured on another model.*\n.*q_proj: its weights differ"):
            lowrank.wrap_model(
                zoo.build("llama", seed=1), presets.tlora(rank=2), statistics=statistics, progress=False
            )
        for dtype in (torch.float32, torch.bfloat16):
            model = zoo.build("llama", dtype)
            lowrank.wrap_model(model, presets.tlora(rank=2), statistics=statistics, progress=False)


def test_statistics_without_a_fingerprint_are_taken_as_they_are(measured: Statistics) -> None:
    other = zoo.build("llama", seed=1)
    lowrank.wrap_model(other, presets.tlora(rank=2), statistics=Statistics(measured), progress=False)


def test_spectra_and_calibration_have_fingerprints() -> None:
    model = zoo.build("perceptron")
    projections = lowrank.find_projections(model)[:2]
    statistics = lowrank.calibrate(
        model, projections, {"covariance"}, [zoo.batch("perceptron")], progress=False
    )
    spectra = Source(progress=False).measure(model, dict.fromkeys(projections, frozenset({"spectrum"})))
    for each in (statistics, spectra):
        each.check(model, projections)
        with pytest.raises(ValueError, match="layers.0: its weights differ"):
            each.check(zoo.build("perceptron", seed=1), projections)


@pytest.mark.parametrize(
    ("before", "here", "said"),
    [(0.0, 1.0, "more than 1000%"), (1.0, 1.0 + 2**-20, "9.54e-05%"), (1.0, 3.0, "200%")],
)
def test_how_much_weights_differ_is_said_in_few_digits(before: float, here: float, said: str) -> None:
    module = nn.Linear(3, 3)
    nn.init.constant_(module.bias, before)
    there = of_tensor(module, "bias")
    nn.init.constant_(module.bias, here)
    message = f"its weights differ by {said} (float32 then, float32 here)"
    assert difference(of_tensor(module, "bias"), there) == message
