"""Folders with names from before transformers 4.52, and with embeddings saved beside the adapter."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lowrank
from lowrank import AdapterError
from lowrank.peft_format.names import present_name
from tests import zoo
from tests.helpers import perturb
from tests.peft_format.common import logits

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
TEXT = {key: zoo.DECODER[key] for key in zoo.DECODER if not key.endswith("_token_id")}
IMAGE = 63


def llava() -> nn.Module:
    torch.manual_seed(0)
    config = hf.LlavaConfig(
        text_config=hf.LlamaConfig(**TEXT),
        vision_config=hf.CLIPVisionConfig(**zoo.VISION),
        image_token_index=IMAGE,
    )
    return hf.LlavaForConditionalGeneration(config).eval()


def qwen2_vl() -> nn.Module:
    torch.manual_seed(0)
    config = hf.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 8},
        image_token_id=IMAGE,
        video_token_id=62,
        vision_start_token_id=61,
    )
    return hf.Qwen2VLForConditionalGeneration(config).eval()


# The model, and its present names by the earlier ones.
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "llava": (
        llava,
        {
            "language_model.model.": "model.language_model.",
            "vision_tower.vision_model.": "model.vision_tower.",
        },
    ),
    "qwen2_vl": (qwen2_vl, {"model.": "model.language_model.", "visual.": "model.visual."}),
}


def output(model: nn.Module) -> Tensor:
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids).logits


def made_by_peft(build: Callable[[], nn.Module], folder: Path, **options: Any) -> Tensor:
    torch.manual_seed(1)
    model = peft.get_peft_model(build(), peft.LoraConfig(r=4, init_lora_weights=False, **options)).eval()
    model.save_pretrained(folder)
    return output(model)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(change(load_file(folder / TENSORS)), folder / TENSORS, {"format": "pt"})


@pytest.mark.parametrize("family", MODELS)
def test_names_of_before_are_read_as_peft_reads_them(family: str, tmp_path: Path) -> None:
    build, renamed = MODELS[family]
    targets = r".*(language_model|visual|vision_tower).*(q_proj|v_proj|fc1|up_proj)"
    wanted = made_by_peft(build, tmp_path, target_modules=targets)

    def older(key: str) -> str:
        for before, now in renamed.items():
            if key.startswith(PREFIX + now):
                return PREFIX + before + key.removeprefix(PREFIX + now)
        return key

    rewrite(tmp_path, lambda tensors: {older(key): tensor for key, tensor in tensors.items()})
    assert not any("model.language_model.layers" in key for key in load_file(tmp_path / TENSORS))
    base = output(build())
    assert not torch.allclose(wanted, base, atol=1e-2)
    if family != "qwen2_vl":  # PEFT 0.21 looks for its table under another name, and finds none
        theirs = peft.PeftModel.from_pretrained(build(), tmp_path).eval()
        torch.testing.assert_close(output(theirs), wanted, **CLOSE)
    model = lowrank.import_peft(build(), tmp_path)
    torch.testing.assert_close(output(model), wanted, **CLOSE)
    assert {"q_proj", "up_proj"} <= {path.rpartition(".")[2] for path in lowrank.adapted_layers(model)}


def test_the_table_of_transformers_4(tmp_path: Path) -> None:
    """There a class has its renamings as an attribute; the first one that fits counts."""

    class Composite(nn.Module):
        _checkpoint_conversion_mapping: ClassVar[dict[str, str]] = {
            "^language_model.model": "model.text",
            "^language_model": "model.other",
        }

        def __init__(self) -> None:
            super().__init__()
            self.model = nn.ModuleDict({"text": nn.ModuleDict({"q_proj": nn.Linear(4, 4)})})

    name = present_name(Composite())
    assert name("language_model.model.q_proj.lora_A.weight") == "model.text.q_proj.lora_A.weight"
    assert name("model.text.q_proj.lora_A.weight") == "model.text.q_proj.lora_A.weight"
    assert name("language_model.k_proj.lora_A.weight") == "language_model.k_proj.lora_A.weight"


def test_a_name_that_fits_no_module_is_refused_as_it_is(tmp_path: Path) -> None:
    made_by_peft(llava, tmp_path, target_modules=r".*language_model.*q_proj")
    rewrite(
        tmp_path, lambda tensors: {k.replace("language_model", "speech_model"): t for k, t in tensors.items()}
    )
    with pytest.raises(
        AdapterError, match="speech_model.layers.0.self_attn.q_proj: the model has no such linear"
    ):
        lowrank.import_peft(llava(), tmp_path)


def test_two_names_of_one_weight_are_refused(tmp_path: Path) -> None:
    made_by_peft(llava, tmp_path, target_modules=r".*language_model.*q_proj")

    def twice(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        old = {k.replace(".model.language_model.", ".language_model.model."): t for k, t in tensors.items()}
        return {**tensors, **{key: tensor + 1 for key, tensor in old.items()}}

    rewrite(tmp_path, twice)
    with pytest.raises(AdapterError, match="are the same weight of this model"):
        lowrank.import_peft(llava(), tmp_path)


# -- embeddings in the folder -------------------------------------------------------------------------


def with_embeddings(family: str, folder: Path, change: float = 0.0) -> Tensor:
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(zoo.build(family), config).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(change)
    model.save_pretrained(folder, save_embedding_layers=True)
    assert any("embed_tokens" in key for key in load_file(folder / TENSORS))
    return logits(model, family)


@pytest.mark.parametrize("family", ["llama", "tied_llama"])
def test_embeddings_that_the_base_has_already(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = with_embeddings(family, tmp_path)
    model = lowrank.import_peft(zoo.build(family), tmp_path)
    torch.testing.assert_close(logits(model, family), wanted, **CLOSE)
    assert lowrank.plan_of(model).train == () and not caplog.records


def test_embeddings_that_differ_are_trained_in_full(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wanted = with_embeddings("llama", tmp_path, change=0.5)
    theirs = peft.PeftModel.from_pretrained(zoo.build("llama"), tmp_path)
    torch.testing.assert_close(logits(theirs, "llama"), wanted, **CLOSE)
    with caplog.at_level(logging.INFO, "lowrank"):
        model = lowrank.import_peft(zoo.build("llama"), tmp_path)
    torch.testing.assert_close(logits(model, "llama"), wanted, **CLOSE)
    assert lowrank.plan_of(model).train == ("model.embed_tokens",)
    assert "replaces these modules in full: model.embed_tokens" in caplog.text
    own = lowrank.import_peft(zoo.build("llama"), tmp_path, train=False)
    assert lowrank.plan_of(own).train == () and not torch.allclose(logits(own, "llama"), wanted, atol=1e-3)


def test_embeddings_that_differ_and_are_tied_are_refused(tmp_path: Path) -> None:
    with_embeddings("tied_llama", tmp_path, change=0.5)
    model = zoo.build("tied_llama")
    with pytest.raises(AdapterError, match="embed_tokens.*tied to"):
        lowrank.import_peft(model, tmp_path)
    assert "_lowrank" not in model.__dict__


def test_embeddings_of_another_vocabulary_are_refused(tmp_path: Path) -> None:
    with_embeddings("llama", tmp_path)
    model = zoo.build("llama")
    model.resize_token_embeddings(zoo.VOCABULARY + 8)
    with pytest.raises(
        AdapterError, match=r"embed_tokens.weight: expected the shape \(72, 32\), got \(64, 32\)"
    ):
        lowrank.import_peft(model, tmp_path)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_a_tied_module_that_peft_trained_apart_comes_to_an_untied_base(module: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=4, init_lora_weights=False, target_modules=["q_proj"], modules_to_save=[module]
    )
    theirs = perturb(peft.get_peft_model(zoo.build("tied_llama"), config).eval())
    theirs.save_pretrained(tmp_path)
    wanted, model = logits(theirs, "tied_llama"), zoo.build("tied_llama")
    with pytest.raises(AdapterError, match=r"is tied to .*target='.*rows=, or untie the two first"):
        lowrank.import_peft(model, tmp_path)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # as docs/targets.md has it
    model.config.tie_word_embeddings = False
    lowrank.import_peft(model, tmp_path)
    torch.testing.assert_close(logits(model, "tied_llama"), wanted, **CLOSE)
