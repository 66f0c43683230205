"""Products take the precision that is asked for, whatever the program around has set."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lowrank.linalg.precision import fast_precision, full_precision, lower_gram, symmetric
from tests.linalg.matrices import gaussian

CPU = torch.device("cpu")


@pytest.fixture
def medium() -> Iterator[None]:
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("width", [1, 5, 255, 256, 300, 600])
def test_the_gram_matrix(width: int) -> None:
    W, V = (gaussian(30, width, seed=seed, dtype=torch.float64) for seed in (0, 1))
    gram = W.mT @ W
    assert torch.allclose(lower_gram(W).tril(), gram.tril())
    assert torch.allclose(symmetric(lower_gram(W)), gram)
    total = lower_gram(W)
    assert lower_gram(V, total) is total
    assert torch.allclose(symmetric(total), gram + V.mT @ V)


def test_full_precision_is_that_of_the_dtype(medium: None) -> None:
    a, b = gaussian(300, 400), gaussian(400, 300, seed=1)
    with torch.autocast("cpu", torch.bfloat16), full_precision(CPU):
        product = a @ b
    assert product.dtype == torch.float32
    assert (product - (a.double() @ b.double())).norm() < 1e-6 * product.norm()


def test_fast_products_have_sums_in_fp32() -> None:
    a, b = gaussian(300, 4000), gaussian(4000, 300, seed=1)
    with torch.autocast("cpu", torch.bfloat16), fast_precision(CPU):
        product = a @ b
    assert product.dtype == torch.float32
    assert (product - (a.double() @ b.double())).norm() < 2**-8 * product.norm()
    halves = a.bfloat16().float(), b.bfloat16().float()
    with fast_precision(CPU):  # bf16 numbers lose nothing
        product = halves[0] @ halves[1]
    assert (product - (halves[0].double() @ halves[1].double())).norm() < 1e-5 * product.norm()


@pytest.mark.parametrize("precision", [full_precision, fast_precision])
def test_it_is_undone_after_an_error(precision: type, medium: None) -> None:
    with pytest.raises(RuntimeError, match="inside"), precision(CPU):
        assert not torch.is_grad_enabled()
        raise RuntimeError("inside")
    assert torch.get_float32_matmul_precision() == "medium" and torch.is_grad_enabled()


# -- whichever switches were used before ------------------------------------------------------------------

SWITCHES = {
    "none": "",
    "older, CUDA": "torch.backends.cuda.matmul.allow_tf32 = True",
    "older, CUDA off": "torch.backends.cuda.matmul.allow_tf32 = False",
    "older, high": "torch.set_float32_matmul_precision('high')",
    "older, medium": "torch.set_float32_matmul_precision('medium')",
    "newer, CUDA": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "newer, CPU": "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
    "newer, all": "torch.backends.fp32_precision = 'tf32'",
    "older, then newer": "torch.backends.cuda.matmul.allow_tf32 = True; "
    "torch.backends.cuda.matmul.fp32_precision = 'ieee'",
    "newer, then older": "torch.backends.cuda.matmul.fp32_precision = 'tf32'; "
    "torch.set_float32_matmul_precision('highest')",
}

PROGRAM = """
import os, sys
import torch
from lowrank.linalg.precision import fast_precision, full_precision

def state():
    def read(name, get):
        try:
            return name, get()
        except RuntimeError:
            return name, "torch refuses"
    return dict([
        read("CUDA", lambda: torch.backends.cuda.matmul.fp32_precision),
        read("CPU", lambda: torch.backends.mkldnn.matmul.fp32_precision),
        read("older", torch.get_float32_matmul_precision),
        read("older, CUDA", lambda: torch.backends.cuda.matmul.allow_tf32),
    ])

def check(switch):
    exec(switch)
    before = state()
    a = torch.randn(64, 64)
    for precision, cuda, older in ((full_precision, "ieee", "highest"), (fast_precision, "tf32", "medium")):
        with precision(torch.device("cpu")):
            found = state()  # a product on CUDA asks the same, and fails where this does
            expected = cuda, older, cuda == "tf32"
            assert (found["CUDA"], found["older"], found["older, CUDA"]) == expected, found
            assert torch.isfinite(a @ a).all()
        assert state() == before, (state(), before)
    if before["CUDA"] == "none" or "torch.backends.fp32_precision" in switch:
        torch.backends.fp32_precision = "ieee"  # it still is inherited
        assert state()["CUDA"] == "ieee", state()

failed = []
for switch in sys.argv[1:]:
    if not (child := os.fork()):  # the switches are the process's, and cannot be taken back
        check(switch)
        os._exit(0)
    failed += [switch] if os.waitpid(child, 0)[1] else []
assert not failed, failed
"""


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch before 2.9")
def test_switches_set_before_are_as_they_were() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, *SWITCHES.values()],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
