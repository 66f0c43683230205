"""The parts of a model of several modalities: vision tower, audio tower, projector, language model.

By the names of modules, and in transformers' models by what a part takes as its input. What is neither a
tower nor a projector is the language model.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from lowrank.models.patterns import matches

VISION, AUDIO, PROJECTOR, LANGUAGE = "vision", "audio", "projector", "language"
PARTS = (VISION, AUDIO, PROJECTOR, LANGUAGE)
PROJECTORS = frozenset(
    "mm_projector connector merger aligner qformer language_projection visual_projection text_projection "
    "audio_projection modality_projection embed_vision embed_audio vision_embed_tokens".split()
)
INPUTS = {"pixel_values": VISION, "input_features": AUDIO, "input_values": AUDIO}


def within(model: nn.Module, part: str) -> Callable[[str], bool]:
    """Whether a path lies in ``part``: one of `PARTS`, or the dotted-suffix pattern of a module.

    Raises:
        ValueError: the model has no such part.
    """
    if part in PARTS:
        parts = {path: _part(model, path) for path, _ in model.named_modules() if path}
        if part in (VISION, AUDIO, PROJECTOR) and part not in parts.values():
            has = sorted({each for each in parts.values() if each != LANGUAGE})
            raise ValueError(
                f"{part}: the model has no such part; it has {', '.join(has) or 'one part only'}"
            )
        return lambda path: parts.get(path) == part
    roots = [path for path, _ in model.named_modules() if path and matches(path, part)]
    if not roots:
        raise ValueError(f"{part}: expected one of {', '.join(PARTS)}, or the name of a module")
    return lambda path: any(path == root or path.startswith(root + ".") for root in roots)


def _part(model: nn.Module, path: str) -> str:
    parts = path.split(".")
    if any(part in PROJECTORS or "projector" in part for part in parts):
        return PROJECTOR
    module = model
    for part in parts:
        module = module.get_submodule(part)
        if "audio" in part or "speech" in part:
            return AUDIO
        if "vision" in part or part in ("visual", "image_encoder"):
            return VISION
        if part in ("language_model", "text_model"):
            return LANGUAGE
        told = INPUTS.get(getattr(module, "main_input_name", ""))
        if told and hasattr(module, "config") and not hasattr(module, "language_model"):
            return told
    return LANGUAGE
