"""PEFT calls an exported model as it is called without adapters, whatever its inputs are named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import lowrank
from lowrank import presets
from tests import zoo
from tests.helpers import perturb
from tests.peft_format.common import CONFIG, warnings_of_peft

pytestmark = warnings_of_peft

IDS = torch.arange(3, 10)[None]
SPEECH = dict(
    vocab_size=64,
    d_model=32,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=1,
)
WAV2VEC2 = dict(
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=48,
    conv_dim=(16,),
    conv_stride=(4,),
    conv_kernel=(8,),
    num_feat_extract_layers=1,
    num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=2,
)


def t5() -> hf.T5ForConditionalGeneration:
    sizes = dict(d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2, vocab_size=64)
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, decoder_start_token_id=0))


def whisper() -> hf.WhisperForConditionalGeneration:
    sizes = dict(num_mel_bins=8, max_source_positions=10, max_target_positions=16)
    return hf.WhisperForConditionalGeneration(hf.WhisperConfig(**SPEECH, **sizes))


def speech2text() -> hf.Speech2TextForConditionalGeneration:
    sizes = dict(input_feat_per_channel=8, input_channels=1, conv_channels=16, max_target_positions=16)
    return hf.Speech2TextForConditionalGeneration(hf.Speech2TextConfig(**SPEECH, **sizes))


def wav2vec2() -> hf.Wav2Vec2ForSequenceClassification:
    return hf.Wav2Vec2ForSequenceClassification(hf.Wav2Vec2Config(**WAV2VEC2, classifier_proj_size=16))


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor], tuple[str, ...], str | None]] = {
    "llama": (lambda: zoo.build("llama"), {"input_ids": IDS}, (), "CAUSAL_LM"),
    "t5": (t5, {"input_ids": IDS, "decoder_input_ids": IDS}, (), "SEQ_2_SEQ_LM"),
    "whisper": (whisper, {"input_features": torch.ones(1, 8, 20), "decoder_input_ids": IDS}, (), None),
    "speech2text": (
        speech2text,
        {"input_features": torch.ones(1, 20, 8), "decoder_input_ids": IDS},
        (),
        None,
    ),
    "wav2vec2": (wav2vec2, {"input_values": torch.linspace(-1, 1, 160)[None]}, ("classifier",), None),
}


def output(model: nn.Module, inputs: dict[str, Tensor]) -> Any:
    with torch.no_grad():
        return model.eval()(**inputs).logits


@pytest.mark.parametrize("family", MODELS)
def test_peft_calls_an_export_as_the_model_is_called(family: str, tmp_path: Path) -> None:
    build, inputs, train, task = MODELS[family]
    torch.manual_seed(0)
    base = build()
    state, plain = base.state_dict(), output(base, inputs)
    lowrank.wrap_model(base, presets.lora(rank=2, train=train), progress=False)
    wanted = output(perturb(base), inputs)
    assert not torch.allclose(wanted, plain, atol=1e-3)
    lowrank.export_peft(base, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["task_type"] == task
    other = build()
    other.load_state_dict(state)
    theirs = peft.PeftModel.from_pretrained(other, tmp_path)
    torch.testing.assert_close(output(theirs, inputs), wanted, rtol=1e-4, atol=1e-5)
