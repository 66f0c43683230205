"""Folders from strangers: thousands of mutations give an error or an adapter, never a crash or half a model.

Damage that nobody planned must be noticed. A forger can write a folder that is consistent; then the
worst is an adapter that says what the folder says.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank import AdapterError, presets
from lowrank.formats.folder import CONFIG, checksum

PEFT_CONFIG, PEFT_TENSORS = "adapter_config.json", "adapter_model.safetensors"
ROUNDS = 250  # mutations of each kind and seed; 14 of them
SEEDS = [0, 1]
THIRDS = {"qkv": {"query": 6, "key": 6, "value": 6}}


class Tiny(nn.Module):
    """A plain, a fused and a trained layer."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.att = nn.ModuleDict({"qkv": nn.Linear(6, 18), "o_proj": nn.Linear(18, 6)})
        self.head = nn.Linear(6, 2)
        for parameter in self.parameters():
            parameter.data.normal_(generator=draw)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.att["o_proj"](self.att["qkv"](x)))


X = torch.linspace(-1, 1, 24).view(4, 6)


class Victim:
    """A model to load onto, and proof that it is as it was."""

    def __init__(self) -> None:
        self.model = Tiny()
        self.modules = dict(self.model.named_modules())
        self.state = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def check(self) -> None:
        assert dict(self.model.named_modules()) == self.modules
        assert "_lowrank" not in self.model.__dict__
        assert all(p.requires_grad for p in self.model.parameters())
        assert all(torch.equal(t, self.state[name]) for name, t in self.model.state_dict().items())


def survives(victim: Victim, load: Callable[[nn.Module, Path], nn.Module], folder: Path) -> Tensor | None:
    """The output after loading, or None after a clean refusal. Anything else fails the test."""
    try:
        load(victim.model, folder)
    except ValueError as error:
        assert str(error)
        victim.check()
        return None
    with torch.no_grad():
        output = victim.model(X)
    assert lowrank.plan_of(victim.model).adapted
    lowrank.unwrap(victim.model)
    victim.check()
    return output


def make() -> nn.Module:
    model = lowrank.wrap_model(Tiny(), presets.pissa(rank=2, train=("head",), fused=THIRDS), progress=False)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.3)
    return model


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("ours")
    lowrank.save_adapter(make(), folder)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("theirs")
    lowrank.export_peft(make(), folder)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def wanted() -> Tensor:
    with torch.no_grad():
        return make()(X)


def put(folder: Path, files: dict[str, bytes]) -> Path:
    for old in folder.iterdir():
        old.unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def tensors_name(files: dict[str, bytes]) -> str:
    return next(name for name in files if name.endswith(".safetensors"))


# -- mutations ----------------------------------------------------------------------------------------


def corrupted(content: bytes, chance: random.Random) -> bytes:
    """Accidents: flipped bits, lost, repeated, swapped and overwritten pieces."""
    data = bytearray(content)
    for _ in range(chance.choice([1, 1, 1, 2, 8])):
        i, j = sorted(chance.randrange(len(data) + 1) for _ in range(2))
        j = min(j, i + chance.choice([1, 8, 100, 10**6]))
        match chance.randrange(7):
            case 0:
                data[min(i, len(data) - 1)] ^= 1 << chance.randrange(8)
            case 1:
                del data[i:]
            case 2:
                del data[i:j]
            case 3:
                data[i:i] = data[i:j]
            case 4:
                data[i:j] = bytes(j - i)
            case 5:
                data[i:j] = chance.randbytes(j - i)
            case 6:
                data += chance.randbytes(chance.randrange(64))
        if not data:
            return b""
    return bytes(data)


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value] if levels % 2 else {"mapping": [[0, value]]}
    return value


NASTY: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 2**31, 2**63, 10**400, 0.0, -0.5, 1e-300, 1e300,
    "", " ", "A", "weight", "bias", "att", "att.qkv", "att.o_proj", "head", "__class__", "__dict__",
    "../../etc/passwd", "/dev/zero", "a\0b", "\ud800", "x" * 5000, "pissa", "LORA", "all-linear", "none",
    "(a+)+$", "(.|.)" * 60, "a?" * 40, "[", "(?P<x", ".*", "Kaiming", "Principal", "system", "eval",
    [], [0], [[]], [0, 18], [0, 6], [-3, 3], [6, 0], ["A"], ["A", "B"], ["head"], {}, {"": 0}, {"role": "x"},
    {"class": "exec"}, {"class": "Factors", "fields": {}}, {"class": "Principal", "fields": {"seed": 3}},
    {"mapping": [[[], {}]]}, {"(a|a)*b": 2, "o_proj": 4}, {"att.qkv": 10**9}, deep(100), deep(101),
]  # fmt: skip


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container with a key of it, all the way down."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = []
    for key, inner in items:
        found.append((value, key))
        found += places(inner)
    return found


def forged(config: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """The same JSON with some values replaced, dropped, moved, renamed or repeated."""
    config = json.loads(json.dumps(config))
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        container, key = chance.choice(places(config))
        match chance.randrange(6):
            case 0 if isinstance(container, dict):
                container[str(chance.choice(NASTY))] = container.pop(key)
            case 1:
                del container[key]
            case 2:
                other, another = chance.choice(places(config))
                container[key], other[another] = json.loads(json.dumps([other[another], container[key]]))
            case 3 if isinstance(container, list):
                container.insert(key, json.loads(json.dumps(container[key])))
            case _:
                container[key] = copy.deepcopy(chance.choice(NASTY))
        if not places(config):
            break
    return config


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header: Any, data: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def forged_tensors(content: bytes, chance: random.Random) -> bytes:
    """A safetensors file whose header lies, or whose data is not what it was."""
    header, data = split(content)
    name = chance.choice([name for name in header if name != "__metadata__"])
    match chance.randrange(9):
        case 0:
            return joined(forged(header, chance), data)
        case 1:
            header[name]["dtype"] = chance.choice(
                ["F64", "F16", "BF16", "I8", "I32", "BOOL", "U8", "F8_E4M3", "C64", ""]
            )
        case 2:
            header[name]["shape"] = chance.choice(
                [[], [0], [2**40, 2**40], [-1], [1] * 50, [2**62], header[name]["shape"][::-1]]
            )
        case 3:
            header[name]["data_offsets"] = sorted(chance.randrange(2 * len(data)) for _ in range(2))
        case 4:
            other = chance.choice(list(header))
            header[name], header[other] = header[other], header[name]
        case 5:
            header[chance.choice(["", "x", "../y", name + "\0", name.upper(), name + ".A0"])] = header.pop(
                name
            )
        case 6:
            start, stop = header[name]["data_offsets"]
            special = struct.pack(
                "<f", chance.choice([float("nan"), float("inf"), -float("inf"), 3e38, 1e-45])
            )
            at = start + 4 * chance.randrange((stop - start) // 4)
            data = data[:at] + special + data[at + 4 :]
        case 7:
            return joined(header, data, chance.choice([0, 1, 2**20, 2**31, 2**40, 2**63 - 1, 2**64 - 1]))
        case 8:
            text = json.dumps(header)
            return joined((text[:-1] + "," + text[1:]).encode(), data)  # every key twice
    return joined(header, data)


def sealed(config: Any, tensors: bytes) -> dict[str, bytes]:
    """Our folder with every hash made right, as a forger would."""
    digest = hashlib.sha256(tensors).hexdigest()
    name = f"adapter-{digest[:16]}.safetensors"
    if isinstance(config, dict):
        config = {**config, "sha256": digest}
        config = {**config, "checksum": checksum(config)}
    named = config.get("tensors") if isinstance(config, dict) else None
    if isinstance(named, str) and named.endswith(".safetensors") and "/" not in named and "\0" not in named:
        name = named[-200:]
    return {CONFIG: json.dumps(config).encode(), name: tensors}


# -- our own folders ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("which", ["json", "tensors"])
def test_accidents_in_our_folders_are_noticed(
    which: str, seed: int, ours: dict[str, bytes], wanted: Tensor, tmp_path: Path
) -> None:
    """Either an error, or nothing that counts was hit (a blank in the JSON): then the same bits."""
    chance, victim, refused = random.Random(seed), Victim(), 0
    name = CONFIG if which == "json" else tensors_name(ours)
    for _ in range(ROUNDS):
        files = {**ours, name: corrupted(ours[name], chance)}
        output = survives(victim, lowrank.load_adapter, put(tmp_path, files))
        assert output is None or torch.equal(output, wanted)
        refused += output is None and files != ours
    assert refused > 0.9 * ROUNDS


@pytest.mark.parametrize("seed", SEEDS)
def test_forged_claims_in_our_folders(seed: int, ours: dict[str, bytes], tmp_path: Path) -> None:
    chance, victim, refused = random.Random(seed), Victim(), 0
    config, tensors = json.loads(ours[CONFIG]), ours[tensors_name(ours)]
    for _ in range(2 * ROUNDS):
        output = survives(
            victim, lowrank.load_adapter, put(tmp_path, sealed(forged(config, chance), tensors))
        )
        assert output is None or output.shape == (4, 2)
        refused += output is None
    assert refused > ROUNDS


@pytest.mark.parametrize("seed", SEEDS)
def test_forged_tensors_in_our_folders(seed: int, ours: dict[str, bytes], tmp_path: Path) -> None:
    chance, victim, refused = random.Random(seed), Victim(), 0
    config = {**json.loads(ours[CONFIG])}
    for _ in range(ROUNDS):
        tensors = forged_tensors(ours[tensors_name(ours)], chance)
        config["tensors"] = f"adapter-{hashlib.sha256(tensors).hexdigest()[:16]}.safetensors"
        output = survives(victim, lowrank.load_adapter, put(tmp_path, sealed(config, tensors)))
        assert output is None or output.shape == (4, 2)  # of huge but finite factors perhaps NaN
        refused += output is None
    assert refused > 0.7 * ROUNDS


# -- PEFT's folders -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_mutated_peft_folders(seed: int, theirs: dict[str, bytes], tmp_path: Path) -> None:
    """The format has no hashes: a flipped bit in a number is another adapter, but a whole and finite one."""
    chance, victim, refused = random.Random(seed), Victim(), 0
    config = json.loads(theirs[PEFT_CONFIG])
    for kind in range(3):
        for _ in range(ROUNDS):
            files = dict(theirs)
            if kind == 0:
                name = chance.choice([PEFT_CONFIG, PEFT_TENSORS])
                files[name] = corrupted(files[name], chance)
            elif kind == 1:
                files[PEFT_CONFIG] = json.dumps(forged(config, chance)).encode()
            else:
                files[PEFT_TENSORS] = forged_tensors(files[PEFT_TENSORS], chance)
            output = survives(victim, lowrank.import_peft, put(tmp_path, files))
            assert output is None or output.shape == (4, 2)
            refused += output is None
    assert refused > 1.5 * ROUNDS


# -- one by one ---------------------------------------------------------------------------------------


def bytes_read() -> int:
    """By this process until now, from files or anything else."""
    with open("/proc/self/io") as file:
        return int(file.readline().removeprefix("rchar: "))


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


HUGE = {
    "header length": "is not a complete safetensors file: 274877906944 bytes, 274877906944 of them header",
    "json": "cannot be read: 274,877,906,944 bytes are more than the limit for adapters",
    "tensor": r"att.o_proj.*\(34359738368, 2\)",  # told by its shape, from the header
    "no tensors": "has 274877906944 bytes, but its header describes another size",
}


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="tells memory and reading by Linux's /proc")
@pytest.mark.parametrize("load", [lowrank.load_adapter, lowrank.import_peft], ids=["ours", "peft"])
@pytest.mark.parametrize("case", ["header length", "json", "tensor", "no tensors"])
def test_what_claims_to_be_huge_is_not_read(
    case: str, load: Any, ours: dict[str, bytes], theirs: dict[str, bytes], tmp_path: Path
) -> None:
    files = dict(ours if load is lowrank.load_adapter else theirs)
    name, huge = tensors_name(files), 1 << 38
    size = huge
    header, data = split(files[name])
    if case == "tensor":  # consistent in itself: a tensor of 256 GiB in a file of that size, all of it a hole
        first = min((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])
        grown = huge - 4 * header[first]["shape"][0] * header[first]["shape"][1]
        for other in header:
            if other != "__metadata__":
                start, stop = header[other]["data_offsets"]
                header[other]["data_offsets"] = [start + grown * (other != first), stop + grown]
        header[first]["shape"] = [huge // 4 // 2, 2]
        files[name] = joined(header, data)
        size = len(files[name]) + grown
    elif case == "header length":
        files[name] = joined(header, data, huge)
    put(tmp_path, files)
    sparse = {
        "tensor": name,
        "header length": name,
        "no tensors": name,
        "json": CONFIG if CONFIG in files else PEFT_CONFIG,
    }
    os.truncate(tmp_path / sparse[case], size)
    victim, memory, read = Victim(), resident(), bytes_read()
    with pytest.raises(AdapterError, match=HUGE[case]):
        load(victim.model, tmp_path)
    victim.check()
    assert resident() - memory < 64 << 20 and bytes_read() - read < 64 << 20


def test_depth_repetition_and_numbers_that_are_none(
    ours: dict[str, bytes], theirs: dict[str, bytes], tmp_path: Path
) -> None:
    for text, message in {
        "[" * 10**6: "cannot be read",
        '{"a":' * 10**5: "cannot be read",
        '{"format": 1, "format": 1}': "the key 'format' appears twice",
        '{"a": NaN}': "NaN is not a finite number",
        '{"a": -Infinity}': "-Infinity is not a finite number",
        '{"a": 1e999}': "1e999 is not a finite number",
        '{"a": ' + "9" * 5000 + "}": "cannot be read",
        "[]": "it is a list, not an object",
        "\xff": "cannot be read",
        "": "cannot be read",
    }.items():  # fmt: skip
        for name, load, files in (
            (CONFIG, lowrank.load_adapter, ours),
            (PEFT_CONFIG, lowrank.import_peft, theirs),
        ):
            victim = Victim()
            put(tmp_path, {**files, name: text.encode("latin-1")})
            with pytest.raises(AdapterError, match=message):
                load(victim.model, tmp_path)
            victim.check()


CLAIMS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "the model itself is to be trained": (lambda c: c["plan"].update(train=[""]), "no such module to train"),
    "a module around the adapted ones": (lambda c: c["plan"].update(train=["att"]), "what lies inside it"),
    "an adapted module": (lambda c: c["plan"].update(train=["att.o_proj"]), "what lies inside it"),
    "the same module twice": (lambda c: c["plan"].update(train=["head", "head"]), "what lies inside it"),
    "negative rows": (
        lambda c: c["plan"]["projections"][0].update(rows=[-1, 5]),
        "the model has no such weight",
    ),
    "rows of two": (
        lambda c: c["plan"]["projections"][1].update(rows=[3, 9]),
        "belong to another one too",
    ),
    "interleaved rows of two": (
        lambda c: c["plan"]["projections"][1].update(rows=[4, 15, 1, 2]),
        "belong to another one too",
    ),
    "rows at no distance": (
        lambda c: c["plan"]["projections"][1].update(rows=[6, 12, 1, 0]),
        "in a weight of shape",
    ),
    "as many rows as numbers": (
        lambda c: c["plan"]["projections"][1].update(rows=[6, 10**15, 1, 2]),
        "in a weight of shape",
    ),
    "a tensor that is no projection": (
        lambda c: c["plan"]["projections"][3].update(param="bias", rows=[0, 1], out_features=1, rank=1),
        "the model has no such weight",
    ),
    "a file elsewhere": (lambda c: c.update(tensors="../x.safetensors"), "outside its folder"),
    "an absolute file": (lambda c: c.update(tensors="/dev/zero.safetensors"), "outside its folder"),
    "both factors frozen": (lambda c: c["frozen"].update({"att.o_proj": ["A", "B"]}), "no frozen factors"),
    "dropout of more than all": (lambda c: c["plan"].update(dropout=1.5), "dropout"),
    "scaling beyond numbers": (lambda c: c["plan"]["projections"][0].update(scaling=10**400), "hold a whole"),
    "an initializer that is none": (lambda c: c["plan"].update(init=["Kaiming"]), "hold a whole"),
    "an initializer of absurd depth": (lambda c: c["plan"].update(init=deep(150)), "hold a whole"),
}  # fmt: skip


@pytest.mark.parametrize("case", CLAIMS)
def test_forged_claims_one_by_one(case: str, ours: dict[str, bytes], tmp_path: Path) -> None:
    change, message = CLAIMS[case]
    config, victim = json.loads(ours[CONFIG]), Victim()
    change(config)
    put(tmp_path, sealed(config, ours[tensors_name(ours)]))
    with pytest.raises(AdapterError, match=message):
        lowrank.load_adapter(victim.model, tmp_path)
    victim.check()


def test_a_pipe_is_not_waited_for(ours: dict[str, bytes], theirs: dict[str, bytes], tmp_path: Path) -> None:
    for files, load in ((ours, lowrank.load_adapter), (theirs, lowrank.import_peft)):
        for name in files:
            put(tmp_path, {other: content for other, content in files.items() if other != name})
            os.mkfifo(tmp_path / name)
            missing = f"holds no {name}" if name in (CONFIG, PEFT_CONFIG) else f"{name} is missing"
            with pytest.raises(AdapterError, match=missing):
                load(Tiny(), tmp_path)
            (tmp_path / name).unlink()
