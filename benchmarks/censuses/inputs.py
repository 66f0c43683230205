"""What a model of transformers is called with: text, images, sound or series, by its arguments' names."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

BATCH, TOKENS = 2, 8


def inputs(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Guesses of what ``model`` can be called with, the likeliest first."""
    config: Any = model.config
    names = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    draw = torch.Generator().manual_seed(0)

    def say(*wanted: str) -> Any:
        """The first of these sizes that the configuration, or one inside it, has."""
        inner = [v for v in vars(config).values() if hasattr(v, "to_dict")]
        for name in wanted:
            for each in (config, *inner):
                value = getattr(each, name, None)
                if value is not None:
                    return value
        return None

    def number(*wanted: str, default: int) -> int:
        value = say(*wanted)
        value = value[0] if isinstance(value, (list, tuple)) and value else value
        return value if isinstance(value, int) and value > 0 else default

    ids = torch.randint(5, 40, (BATCH, TOKENS), generator=draw)
    ones = torch.ones(BATCH, TOKENS, dtype=torch.long)
    channels = number("num_channels", "in_channels", "in_chans", default=3)
    size = number("image_size", "img_size", default=64)
    pixels = torch.randn(BATCH, channels, size, size, generator=draw)
    mels = number("num_mel_bins", "n_mels", "feature_size", default=16)
    frames = 2 * number("max_source_positions", default=64)
    width = number("hidden_size", "d_model", default=32)
    known: dict[str, Tensor] = {
        "input_ids": ids,
        "attention_mask": ones,
        "decoder_input_ids": ids.flip(0),
        "pixel_values": pixels,
        "input_values": torch.randn(BATCH, 3200, generator=draw),
        "input_features": torch.randn(BATCH, mels, frames, generator=draw),
        "bbox": torch.ones(BATCH, TOKENS, 4, dtype=torch.long),
        "hidden_states": torch.randn(BATCH, TOKENS, width, generator=draw),
        "past_values": torch.randn(BATCH, number("context_length", default=32), generator=draw),
        "entity_ids": torch.ones(BATCH, 2, dtype=torch.long),
        "entity_position_ids": torch.arange(4).view(1, 2, 2).repeat(BATCH, 1, 1),
        "inputs_embeds": torch.randn(BATCH, TOKENS, width, generator=draw),
    }
    text = [name for name in ("input_ids", "attention_mask", "bbox", "decoder_input_ids") if name in names]
    text += [name for name in ("entity_ids", "entity_position_ids") if name in names]
    if main in ("pixel_values", "input_values", "input_features", "past_values", "hidden_states"):
        first = [main, *(["decoder_input_ids"] if "decoder_input_ids" in names else [])]
        yield {name: known[name] for name in first}
        if main == "input_features":
            yield {name: known[name].transpose(1, 2) if name == main else known[name] for name in first}
        if main == "input_values":
            yield {main: torch.randn(BATCH, 1, 3200, generator=draw)}
            yield {main: torch.randn(BATCH, 1024, 128, generator=draw)}
        if main == "pixel_values":
            video = number("num_frames", default=2)
            yield {main: pixels.unsqueeze(1).repeat(1, video, 1, 1, 1)}
            if "input_ids" in names:
                yield {main: pixels, **{name: known[name] for name in text}}
        if main == "past_values":
            length, variables = number("context_length", default=32), number("num_input_channels", default=1)
            yield {main: torch.randn(BATCH, length, variables, generator=draw)}
            past = length + max(say("lags_sequence") or [0])
            yield {
                main: torch.randn(BATCH, past, generator=draw),
                "past_time_features": torch.randn(BATCH, past, number("num_time_features", default=1)),
                "past_observed_mask": torch.ones(BATCH, past),
            }
    if "input_ids" in names:
        if "pixel_values" in names and main != "pixel_values":
            needed = names["pixel_values"].default is inspect.Parameter.empty
            if needed or not hasattr(config, "text_config") or say("projection_dim"):
                yield {**{name: known[name] for name in text}, "pixel_values": pixels}
        yield {name: known[name] for name in text}
        yield {"input_ids": ids}
    if "decoder_input_ids" in names and "input_features" in names:
        yield {"input_features": known["input_features"], "decoder_input_ids": ids}
    if "inputs" in names:
        yield {"inputs": ids}
    needed = [
        name
        for name, each in names.items()
        if each.default is inspect.Parameter.empty
        and each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)
    ]
    if needed and all(name in known for name in needed):
        yield {name: known[name] for name in needed}
    for name in ("pixel_values", "input_values", "input_features"):
        if name in names and name != main:
            yield {name: known[name]}
