"""The command `lowrank`, on real files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowrank
from lowrank_cli import main
from tests.helpers import perturb

hf = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama in bf16, in several shards."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("base")
    hf.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="8kB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights stored (in, out), one of them square."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("gpt2")
    config = hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=16)
    hf.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def load(folder: Path) -> nn.Module:
    kind = {"llama": hf.LlamaForCausalLM, "gpt2": hf.GPT2LMHeadModel}
    return kind[hf.AutoConfig.from_pretrained(folder).model_type].from_pretrained(folder, dtype="auto")


def adapted(base: Path, folder: Path, policy: Any, size: float = 0.1) -> nn.Module:
    model = lowrank.wrap_model(load(base), policy)
    perturb(model, size)
    lowrank.save_adapter(model, folder)
    return model


def call(*arguments: object) -> int:
    return main([str(each) for each in arguments])


@pytest.mark.parametrize("preset", ["lora", "pissa", "milora"])
def test_merge_gives_what_merging_in_memory_gives(base: Path, tmp_path: Path, preset: str) -> None:
    model = adapted(base, tmp_path / "adapter", getattr(lowrank.presets, preset)(rank=4, train=("lm_head",)))
    assert call("merge", base, tmp_path / "adapter", "--out", tmp_path / "merged", "--quiet") == 0
    expected, plain = lowrank.merge(model).state_dict(), load(base).state_dict()
    got = load(tmp_path / "merged").state_dict()
    changed = 0
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-2, atol=1e-6)  # one step of bf16
        changed += not torch.equal(got[name], plain[name])
        if torch.equal(tensor, plain[name]):
            assert torch.equal(got[name], plain[name])
    assert changed == 15
    assert (tmp_path / "merged/model.safetensors.index.json").exists()


@pytest.mark.parametrize("format", ["lowrank", "peft"])
def test_merge_into_transposed_weights(gpt2: Path, tmp_path: Path, format: str) -> None:
    policy = lowrank.presets.lora(rank=4, target=("query", "value", "output"))
    model = adapted(gpt2, tmp_path / "adapter", policy)
    if format == "peft":
        lowrank.export_peft(model, tmp_path / "peft")
    source = tmp_path / ("peft" if format == "peft" else "adapter")
    assert call("merge", gpt2, source, "--out", tmp_path / "merged", "--quiet") == 0
    expected, got = lowrank.merge(model).state_dict(), load(tmp_path / "merged").state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-5, atol=1e-6)
    assert not torch.equal(
        got["transformer.h.0.attn.c_proj.weight"],
        load(gpt2).state_dict()["transformer.h.0.attn.c_proj.weight"],
    )


def test_merge_refuses_another_base_and_writes_nothing(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapted(base, tmp_path / "adapter", lowrank.presets.lora(rank=4))
    other = load(base)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    capsys.readouterr()
    assert call("merge", tmp_path / "other", tmp_path / "adapter", "--out", tmp_path / "merged") == 2
    said = capsys.readouterr().err
    assert "layers.1.mlp.up_proj" in said and said.count("\n") == 1
    assert not (tmp_path / "merged").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_merge_refuses_a_folder_that_is_there(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapted(base, tmp_path / "adapter", lowrank.presets.lora(rank=4))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/note").write_text("mine")
    assert call("merge", base, tmp_path / "adapter", "--out", tmp_path / "out") == 2
    assert "name a new folder" in capsys.readouterr().err
    assert (tmp_path / "out/note").read_text() == "mine"


def test_inspect_shows_the_size_of_each_update(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = adapted(base, tmp_path / "adapter", lowrank.presets.pissa(rank=4))
    assert call("inspect", tmp_path / "adapter", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    layers = lowrank.adapted_layers(model)
    assert len(found["projections"]) == len(layers) == 14
    for row in found["projections"]:
        delta = layers[row["projection"]].delta_weight().double()
        assert row["norm"] == pytest.approx(float(delta.norm()), rel=1e-4)
        assert row["largest"] == pytest.approx(float(torch.linalg.matrix_norm(delta, 2)), rel=1e-4)
        assert row["rank"] == 4
    assert call("inspect", tmp_path / "adapter") == 0
    assert "trainable adapter parameters" in capsys.readouterr().out


def test_diff_tells_equal_from_different(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = adapted(base, tmp_path / "one", lowrank.presets.lora(rank=4))
    lowrank.save_adapter(model, tmp_path / "same")
    lowrank.export_peft(model, tmp_path / "peft")
    with torch.no_grad():
        lowrank.adapted_layers(model)["model.layers.0.mlp.up_proj"].adapters["default"][0].B.mul_(2)
    lowrank.save_adapter(model, tmp_path / "two")
    assert call("diff", tmp_path / "one", tmp_path / "same") == 0
    assert call("diff", tmp_path / "one", tmp_path / "peft", "--json") == 0
    capsys.readouterr()
    assert call("diff", tmp_path / "two", tmp_path / "one", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    differing = {name: distance for name, distance in found["distances"].items() if distance}
    assert differing == {"model.layers.0.mlp.up_proj.weight": pytest.approx(1.0, rel=1e-4)}


def test_magnitudes_are_shown_compared_and_not_lost(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = adapted(base, tmp_path / "one", lowrank.presets.dora(rank=4))
    lowrank.export_peft(model, tmp_path / "peft")
    assert call("verify", tmp_path / "one", "--base", base) == 0
    for folder in ("one", "peft"):
        capsys.readouterr()
        assert call("inspect", tmp_path / folder, "--json") == 0
        assert json.loads(capsys.readouterr().out)["dora"] is True
        assert call("merge", base, tmp_path / folder, "--out", tmp_path / "merged") == 2
        assert "has magnitudes (DoRA)" in capsys.readouterr().err
        assert not (tmp_path / "merged").exists()
    assert call("diff", tmp_path / "one", tmp_path / "one") == 0
    with torch.no_grad():
        (adapter,) = lowrank.adapted_layers(model)["model.layers.0.mlp.up_proj"].adapters["default"]
        adapter.magnitude.offset[0] += 1
    lowrank.save_adapter(model, tmp_path / "two")
    for other in ("one", "peft"):
        capsys.readouterr()
        assert call("diff", tmp_path / "two", tmp_path / other, "--json") == 1
        found = json.loads(capsys.readouterr().out)
        assert (
            "model.layers.0.mlp.up_proj.weight: the magnitudes (DoRA) are not the same" in found["problems"]
        )


@pytest.mark.parametrize("format", ["lowrank", "peft"])
def test_merge_into_an_embedding(base: Path, tmp_path: Path, format: str) -> None:
    model = adapted(base, tmp_path / "lowrank", lowrank.presets.lora(rank=4, target=("embedding", "query")))
    lowrank.export_peft(model, tmp_path / "peft")
    assert call("merge", base, tmp_path / format, "--out", tmp_path / "merged", "--quiet") == 0
    got, plain = load(tmp_path / "merged").state_dict(), load(base).state_dict()
    for name, tensor in lowrank.merge(model).state_dict().items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-2, atol=1e-6)  # one step of bf16
    assert not torch.equal(got["model.embed_tokens.weight"], plain["model.embed_tokens.weight"])


@pytest.mark.parametrize("format", ["lowrank", "peft"])
@pytest.mark.parametrize("flag", [None, True])
def test_merge_refuses_a_tied_embedding(
    gpt2: Path, tmp_path: Path, format: str, flag: bool | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint has the weight once, and nothing but the model's class says that a head has it too."""
    base = tmp_path / "base"
    shutil.copytree(gpt2, base)
    config = json.loads((base / "config.json").read_text())
    config.pop("tie_word_embeddings")
    flags = {} if flag is None else {"tie_word_embeddings": flag}
    (base / "config.json").write_text(json.dumps(config | flags))
    model = adapted(base, tmp_path / "lowrank", lowrank.presets.lora(rank=2, target=("wte", "c_fc")))
    lowrank.export_peft(model, tmp_path / "peft")
    with pytest.raises(ValueError, match="tied to another module's weight"):
        lowrank.merge(model)
    assert call("merge", base, tmp_path / format, "--out", tmp_path / "merged", "--quiet") == 2
    said = capsys.readouterr().err
    assert "wte.weight: it is tied to lm_head.weight, which merging would change too" in said
    assert "lowrank.merge(model, untie=True)" in said and not (tmp_path / "merged").exists()


def test_merge_into_an_embedding_that_no_head_shares(tmp_path: Path) -> None:
    """A class without a head, whose configuration says that embeddings are tied, as is its default."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
    base = hf.BertForSequenceClassification(hf.BertConfig(vocab_size=64, **sizes))
    base.save_pretrained(tmp_path / "base")
    assert base.config.tie_word_embeddings
    lowrank.wrap_model(base, lowrank.presets.lora(rank=2, target=("word_embeddings", "query")))
    lowrank.save_adapter(perturb(base), tmp_path / "adapter")
    assert (
        call("merge", tmp_path / "base", tmp_path / "adapter", "--out", tmp_path / "merged", "--quiet") == 0
    )
    got = hf.BertForSequenceClassification.from_pretrained(tmp_path / "merged").state_dict()
    for name, tensor in lowrank.merge(base).state_dict().items():
        torch.testing.assert_close(got[name], tensor)


def test_merge_refuses_an_embedding_of_a_class_that_cannot_be_asked(
    gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(gpt2, tmp_path / "base")
    adapted(tmp_path / "base", tmp_path / "adapter", lowrank.presets.lora(rank=2, target=("wte",)))
    config = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps({**config, "architectures": ["Nobody"]}))
    assert (
        call("merge", tmp_path / "base", tmp_path / "adapter", "--out", tmp_path / "merged", "--quiet") == 2
    )
    assert "could not be asked" in capsys.readouterr().err and not (tmp_path / "merged").exists()


def test_an_export_in_other_factors_is_the_same_adapter(
    gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = adapted(gpt2, tmp_path / "own", lowrank.presets.pissa(rank=3))
    lowrank.export_peft(model, tmp_path / "peft", serving=True)
    assert call("diff", tmp_path / "own", tmp_path / "peft") == 0
    assert capsys.readouterr().out == "the two adapters are equal\n"
    with torch.no_grad():
        next(lowrank.adapter_parameters(model)).mul_(1 + 1e-6)
    lowrank.export_peft(model, tmp_path / "peft", serving=True)
    assert call("diff", tmp_path / "own", tmp_path / "peft") == 1


def test_convert_and_combine(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapted(base, tmp_path / "a", lowrank.presets.lora(rank=4))
    adapted(base, tmp_path / "b", lowrank.presets.lora(rank=2), size=0.3)
    assert call("convert", tmp_path / "a", "--to", "peft", "--base", base, "--out", tmp_path / "p") == 0
    assert call("convert", tmp_path / "p", "--to", "lowrank", "--base", base, "--out", tmp_path / "l") == 0
    assert call("diff", tmp_path / "a", tmp_path / "l") == 0
    shares = f"{tmp_path / 'a'}=0.5", f"{tmp_path / 'b'}=-1"
    assert call("combine", *shares, "--base", base, "--out", tmp_path / "c") == 0
    capsys.readouterr()
    assert call("verify", tmp_path / "c", "--base", base) == 0
    assert "and fits" in capsys.readouterr().out
    model = lowrank.load_adapter(load(base), tmp_path / "c")
    one = lowrank.load_adapter(load(base), tmp_path / "a")
    two = lowrank.load_adapter(load(base), tmp_path / "b")
    for name, layer in lowrank.adapted_layers(model).items():
        parts = [lowrank.adapted_layers(each)[name].delta_weight() for each in (one, two)]
        torch.testing.assert_close(layer.delta_weight(), 0.5 * parts[0] - parts[1], rtol=1e-4, atol=1e-5)


def test_plan_of_a_local_model(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("plan", base, "--rank", 4, "--target", "query", "value", "--out", tmp_path / "plan.json") == 0
    assert "q_proj" in capsys.readouterr().out
    plan = lowrank.Plan.load(tmp_path / "plan.json")
    assert {p.role.value for p in plan.adapted} == {"query", "value"}
    assert call("plan", base, "--method", "tlora") == 2
    assert "--data" in capsys.readouterr().err


def test_a_damaged_adapter_is_one_line(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = lowrank.wrap_model(load(base), lowrank.presets.lora(rank=4))
    lowrank.save_adapter(model, tmp_path / "a")
    assert call("verify", tmp_path / "a") == 0
    file = next((tmp_path / "a").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    capsys.readouterr()
    assert call("verify", tmp_path / "a") == 2
    said = capsys.readouterr().err
    assert "is damaged" in said and said.count("\n") == 1
    assert call("inspect", tmp_path / "nothing") == 2


@pytest.mark.slow
def test_merge_needs_little_memory(tmp_path: Path) -> None:
    """Merging into a checkpoint of 768 MiB raises the process's peak by less than 512 MiB."""
    from safetensors.torch import save_file

    (tmp_path / "base").mkdir()
    modules = nn.ModuleDict({f"m{i}": nn.Linear(8192, 4096, bias=False) for i in range(2)})
    lowrank.wrap_model(modules, lowrank.presets.lora(rank=4, target=("m0", "m1")))
    perturb(modules)
    for i in range(2):
        base = lowrank.adapted_layers(modules)[f"m{i}"].base.weight.detach()
        for half in (0, 1):
            more = {f"m{i}.weight": base} if half else {f"other{i}": torch.zeros(8192, 8192)}
            save_file(more, tmp_path / f"base/model-{2 * i + half}.safetensors")
    lowrank.save_adapter(modules, tmp_path / "adapter")
    script = (
        "import resource, sys, torch, lowrank.cli.merge; from lowrank_cli import main\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert main(sys.argv[1:]) == 0\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    arguments = ["merge", tmp_path / "base", tmp_path / "adapter", "--out", tmp_path / "merged", "--quiet"]
    run = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, check=True
    )
    assert int(run.stdout.splitlines()[-1]) < 512


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("verify", "{adapter} --base {base}"),
        ("convert", "{adapter} --to lowrank --base {base} --out {new}"),
        ("combine", "{adapter} --base {base} --out {new}"),
        ("plan", "{base}"),
    ],
)
def test_quiet_hides_the_bars_of_loading_a_model(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], command: str, arguments: str
) -> None:
    adapted(base, tmp_path / "adapter", lowrank.presets.lora(rank=2))
    shown = []
    for more in ([], ["--quiet"]):
        hf.utils.logging.enable_progress_bar()
        capfd.readouterr()
        new = tmp_path / f"new{len(more)}"
        words = arguments.format(adapter=tmp_path / "adapter", base=base, new=new).split()
        try:
            assert call(command, *words, *more) == 0
        finally:
            hf.utils.logging.enable_progress_bar()
        shown.append("Loading weights" in capfd.readouterr().err)
    assert shown == [True, False]


def test_help_needs_no_torch() -> None:
    started = time.perf_counter()
    script = "import sys, lowrank_cli; lowrank_cli.parser().format_help(); print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
    assert time.perf_counter() - started < 30


def test_every_command_has_its_file() -> None:
    from importlib import import_module

    from lowrank_cli import parser

    commands = next(a for a in parser()._actions if hasattr(a, "choices") and a.choices).choices
    for name in commands:  # type: ignore[union-attr]
        assert callable(import_module(f"lowrank.cli.{name}").run)


def test_a_file_of_diffusers_is_read_as_the_folder_is(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By every command, the file itself and a folder as diffusers writes it."""
    model = adapted(base, tmp_path / "own", lowrank.presets.lora(rank=4))
    (tmp_path / "theirs").mkdir()
    file = tmp_path / "theirs" / "pytorch_lora_weights.safetensors"
    lowrank.export_diffusers(model, file)
    for theirs in (file, file.parent):
        assert call("inspect", theirs) == 0 and "diffusers adapter, 14 projections" in capsys.readouterr().out
        assert call("diff", tmp_path / "own", theirs) == 0
        assert call("verify", theirs, "--base", base) == 0
    assert call("convert", file, "--to", "lowrank", "--base", base, "--out", tmp_path / "back") == 0
    assert call("diff", tmp_path / "own", tmp_path / "back") == 0
    for name in ("own", "theirs"):
        assert call("merge", base, tmp_path / name, "--out", tmp_path / f"merged-{name}") == 0
    one, other = (load(tmp_path / f"merged-{name}").state_dict() for name in ("own", "theirs"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    capsys.readouterr()


def test_errors_say_what_was_expected(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*arguments: object) -> str:
        assert call(*arguments) == 2
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lowrank ")]
        assert len(said) == 1
        return said[0]

    for nothing in (base, tmp_path / "none"):
        said = error("inspect", nothing)
        assert "adapter.json" in said and "adapter_config.json" in said and "safetensors" in said
    (tmp_path / "text.safetensors").write_text("text")
    assert "expected a safetensors file" in error("inspect", tmp_path / "text.safetensors")
    assert "none.jsonl" in error("plan", base, "--method", "tlora", "--data", tmp_path / "none.jsonl")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    said = error("plan", base, "--method", "tlora", "--data", tmp_path / "rows.jsonl")
    assert f"{base} holds no tokenizer" in said
    adapted(base, tmp_path / "dora", lowrank.presets.dora(rank=2))
    said = error("merge", base, tmp_path / "dora", "--out", tmp_path / "merged")
    assert said.count("magnitudes (DoRA)") == 1 and not (tmp_path / "merged").exists()


def test_a_sum_names_the_folders_that_it_was_made_of(base: Path, tmp_path: Path) -> None:
    """Two of one name are told apart; an adapter's name has no dots."""
    for folder in ("a/v1.5", "b/v1.5"):
        adapted(base, tmp_path / folder, lowrank.presets.lora(rank=2))
    one, other = tmp_path / "a/v1.5", tmp_path / "b/v1.5"
    assert call("combine", f"{one}=0.5", other, "--base", base, "--out", tmp_path / "sum") == 0
    (note,) = lowrank.plan_of(lowrank.load_adapter(load(base), tmp_path / "sum")).notes
    assert "v1_5: 0.5" in note and "v1_5-2: 1" in note
