"""Reads one LoRA file of diffusers, such as its `save_lora_weights` writes, as a PEFT folder.

The file has no configuration: ranks come from the tensors, and scalings from alphas, if there are any.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lowrank.files import AdapterError, write_pieces
from lowrank.formats.tensors import packed
from lowrank.peft_format.folder import PREFIX
from lowrank.peft_format.load import import_peft

PREFIXES = ("transformer", "unet")
KEY = re.compile(r"(?P<module>.+)\.(lora_(?P<factor>[AB])\.weight|alpha)")


def import_diffusers(
    model: nn.Module, path: str | Path, name: str = "default", *, prefix: str | None = None
) -> nn.Module:
    """Adapts a denoiser of diffusers in place as the LoRA file ``path`` says, and returns it.

    Where the file has alphas, a layer's scaling is alpha / rank; else it is the most common rank / rank, as
    diffusers takes it: 1 where all ranks are equal.

    Args:
        name: of the adapter in ``model``.
        prefix: of the keys that are meant; by default ``"transformer"`` or ``"unet"``, or none.

    Raises:
        AdapterError: the file is missing or damaged, has keys of another format (such as Kohya's), or was
            made for another base. The model is untouched then.
        ValueError: the name is taken.
    """
    with as_peft_folder(path, prefix) as folder:
        return import_peft(model, folder, name)


@contextmanager
def as_peft_folder(path: str | Path, prefix: str | None = None) -> Iterator[Path]:
    """Inside, a folder of PEFT with what the LoRA file ``path`` holds.

    Raises AdapterError as `import_diffusers` does; one that is raised inside names the file too.
    """
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{path}: expected a safetensors file: {error}") from error
    ranks, alphas, factors = _sorted(_below(stored, prefix, path), path)
    usual = Counter(ranks.values()).most_common(1)[0][0]
    config = {
        "peft_type": "LORA",
        "r": usual,
        "lora_alpha": usual,
        "target_modules": sorted(ranks),
        "rank_pattern": {module: rank for module, rank in ranks.items() if rank != usual},
        "alpha_pattern": alphas,
    }
    with TemporaryDirectory() as folder:
        (Path(folder) / "adapter_config.json").write_text(json.dumps(config))
        write_pieces(Path(folder) / "adapter_model.safetensors", packed(factors))
        try:
            yield Path(folder)
        except AdapterError as error:
            raise AdapterError(str(error).replace(folder, str(path))) from error


def _below(stored: Mapping[str, Tensor], prefix: str | None, path: str | Path) -> dict[str, Tensor]:
    """The tensors below ``prefix``, by what follows it."""
    starts = {key.partition(".")[0] for key in stored}
    prefixes = [prefix] if prefix else [each for each in PREFIXES if each in starts]
    if not prefixes:
        return dict(stored)
    found = {
        key.removeprefix(f"{prefixes[0]}."): value
        for key, value in stored.items()
        if key.startswith(f"{prefixes[0]}.")
    }
    if not found:
        raise AdapterError(f"{path} has no key below {prefixes[0]!r}; its keys begin with {sorted(starts)}")
    return found


def _sorted(
    tensors: Mapping[str, Tensor], path: str | Path
) -> tuple[dict[str, int], dict[str, float], dict[str, Tensor]]:
    """Ranks and alphas by module, and the factors under PEFT's keys."""
    matches = {key: KEY.fullmatch(key) for key in tensors}
    others = [key for key, match in matches.items() if match is None]
    if others or not tensors:
        seen = ", ".join(others[:3]) or "nothing"
        raise AdapterError(f"{path}: expected keys that end with lora_A.weight or lora_B.weight, got {seen}")
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    factors: dict[str, Tensor] = {}
    for key, match in matches.items():
        assert match is not None
        module, factor = match["module"], match["factor"]
        if factor is None:
            alphas[module] = float(tensors[key])
            continue
        factors[f"{PREFIX}{key}"] = tensors[key]
        if factor == "A":
            ranks[module] = len(tensors[key])
    if not ranks:
        raise AdapterError(f"{path} has no lora_A.weight")
    return ranks, alphas, factors
