"""What a user gets: a light import, names that exist, and a wheel with the whole package in it."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import lowrank

ROOT = Path(__file__).parents[1]
DEPENDENCIES = "import torch, einops, safetensors.torch, tqdm.auto"

OPTIONAL = {"accelerate", "bitsandbytes", "hypothesis", "matplotlib", "pandas", "peft", "scipy", "torchao"}
OPTIONAL |= {"transformers"}

ABSENT = """
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {absent} else self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


def fresh(code: str) -> list[str]:
    """The lines that a new process prints when it runs ``code`` in the repository's root."""
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def loaded(code: str) -> set[str]:
    """The top-level modules, standard library apart, that running ``code`` loads."""
    names = fresh(f"{code}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})")
    return set(names) - set(sys.stdlib_module_names)


def test_import_loads_the_four_dependencies_and_nothing_else() -> None:
    assert loaded("import lowrank") - loaded(DEPENDENCIES) == {"lowrank"}


def test_import_works_where_only_the_dependencies_are_installed() -> None:
    code = "import lowrank, lowrank.train\nprint(*lowrank.__all__)"
    assert fresh(ABSENT.format(absent=OPTIONAL) + code) == list(lowrank.__all__)


def test_the_whole_way_works_where_only_the_dependencies_are_installed(tmp_path: Path) -> None:
    code = f"""
import torch, lowrank
from torch import nn
def network():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(6, 2, 12, batch_first=True)
    return nn.Sequential(nn.Linear(8, 6), encoder, nn.Linear(6, 3))
x = torch.randn(4, 5, 8)
model = lowrank.wrap_model(network(), lowrank.presets.pissa(rank=2))
loss = lambda model, batch: model(batch).square().mean()
history = lowrank.train.fit(model, [x] * 3, loss, lr=1e-2, progress=False)
lowrank.save_adapter(model, {str(tmp_path / "adapter")!r})
again = lowrank.load_adapter(network(), {str(tmp_path / "adapter")!r})
print(len(history), torch.equal(model.eval()(x), again.eval()(x)))
"""
    assert fresh(ABSENT.format(absent=OPTIONAL) + code) == ["3", "True"]


def test_the_planted_absence_is_felt() -> None:
    with pytest.raises(AssertionError, match="No module named 'transformers'"):
        fresh(ABSENT.format(absent={"transformers"}) + "import transformers")


def test_public_names_exist() -> None:
    assert lowrank.__all__ and len(set(lowrank.__all__)) == len(lowrank.__all__)
    assert [name for name in lowrank.__all__ if not hasattr(lowrank, name)] == []


def test_the_wheel_holds_the_package(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith("METADATA"))
        head = archive.read(metadata).decode().split("\n\n")[0].splitlines()
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "lowrank").rglob("*.py")}
    assert sources | {"lowrank/py.typed"} <= names
    assert {name.split("/")[0] for name in names} == {"lowrank", "lowrank_cli.py", metadata.split("/")[0]}
    assert {f"Name: {project['name']}", f"Version: {lowrank.__version__}"} <= set(head)
    required = {
        line.removeprefix("Requires-Dist: ") for line in head if "Requires-Dist" in line and ";" not in line
    }
    assert required == set(project["dependencies"])
