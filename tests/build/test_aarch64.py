"""The CPU kernels compiled for ARM and run under qemu, against the same numpy as here; needs a cross compiler."""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_attention as attention
import test_kernels as kernels
import test_sampling as sampling
import tvm

from mlcbuild.compiler.kernels import linear_dot, quantize_rows
from mlcbuild.quantization.group import get_zero
from mlcbuild.recipes.load import load_recipes

ROOT = Path(__file__).parents[2]
COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
CODES = {"i": 0, "u": 1, "f": 2}  # DLPack's

pytestmark = pytest.mark.skipif(
    not (shutil.which(COMPILER) and shutil.which(EMULATOR)), reason=f"no {COMPILER} or no {EMULATOR} on PATH"
)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(params=["aarch64", "aarch64-dotprod"])
def target(request: pytest.FixtureRequest) -> dict[str, Any]:
    return load_recipes(ROOT / "recipes").targets[request.param].tvm


@pytest.fixture
def build(target: dict[str, Any], tmp_path: Path) -> Callable[[Any], Callable[..., None]]:
    """As test_kernels.build, for ARM."""
    made: list[Path] = []

    def build(kernel: Any, _target: str | None = None) -> Callable[..., None]:
        name = tmp_path / f"kernel{len(made)}"
        made.append(name)
        module = tvm.IRModule({"f": kernel.with_attr("global_symbol", "f")})
        tvm.compile(module, tvm.target.Target(target)).mod.write_to_file(f"{name}.o", "o")
        main = Path(__file__).with_name("arm_main.c")
        subprocess.run([COMPILER, "-O1", "-static", str(main), f"{name}.o", "-lm", "-o", str(name)], check=True)
        return lambda *args: run(name, args)

    return build


def run(program: Path, args: tuple[Any, ...]) -> None:
    """Arrays change in place."""
    words = [struct.pack("<i", len(args))]
    for a in args:
        if isinstance(a, np.ndarray):
            words.append(struct.pack(f"<3i{a.ndim}q", a.ndim, CODES[a.dtype.kind], a.itemsize * 8, *a.shape))
            words.append(a.tobytes())
        else:
            words.append(struct.pack("<3iq", -1, 0, 64, a))
    done = subprocess.run([EMULATOR, str(program)], input=b"".join(words), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    at = 0
    for a in args:
        if isinstance(a, np.ndarray):
            a[...] = np.frombuffer(done.stdout, a.dtype, a.size, at).reshape(a.shape)
            at += a.nbytes
    assert at == len(done.stdout)


def test_small_kernels(monkeypatch: pytest.MonkeyPatch, build: Any, rng: np.random.Generator) -> None:
    monkeypatch.setattr(kernels, "build", build)
    kernels.test_elementwise(rng)
    kernels.test_rope_table()
    kernels.test_embedding_rows16(rng, kernels.Q4F16)
    kernels.test_embedding_int8(rng, kernels.Q8F16)
    kernels.test_fused_quantization_equals_its_parts(rng, 96)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_attention(monkeypatch: pytest.MonkeyPatch, build: Any, rng: np.random.Generator, dtype: str) -> None:
    monkeypatch.setattr(attention, "build", build)
    attention.test_attention_over_pages(rng, dtype, 8, 2, 64)


def test_sampling(monkeypatch: pytest.MonkeyPatch, build: Any, rng: np.random.Generator) -> None:
    monkeypatch.setattr(sampling, "build", build)
    sampling.test_tokens_lie_where_the_draw_says(rng, None, 1000)
    sampling.test_unusable_rows_hurt_no_other(rng)


@pytest.mark.parametrize("q", [kernels.Q4F16, kernels.Q8F16, kernels.Q0F16, kernels.Q0BF16], ids=lambda q: q.name)
def test_linear_rows16(monkeypatch: pytest.MonkeyPatch, build: Any, rng: np.random.Generator, q: Any) -> None:
    monkeypatch.setattr(kernels, "build", build)
    kernels.test_linear_rows16(rng, q, 40, False, True)


@pytest.mark.parametrize("target", ["aarch64-dotprod"], indirect=True)
@pytest.mark.parametrize("q", kernels.BYTES, ids=lambda q: q.name)
def test_linear_with_dot_products(build: Any, rng: np.random.Generator, q: Any) -> None:
    rows, width, dot = 40, 160, linear_dot.DOTS["asimddp"]
    packed, dense = kernels.make_weights(rng, q, "int8-16x64", (rows, width))
    quantizer = build(quantize_rows.make_quantize_rows(width, zero=get_zero(q.bits)))
    kernel = build(linear_dot.make_linear(rows, width, dot, bits=q.bits, bias=False, residual=True))
    for n in (1, 2, 5, 67):
        x, y = rng.normal(size=(n, width)).astype(np.float32), rng.normal(size=(n, 48)).astype(np.float32)
        acts, wanted = kernels.codes_for(n, width), kernels.quantize(x) @ dense.T + y[:, :rows]
        quantizer(x, *acts)
        kernel(*packed, *acts, y)
        np.testing.assert_allclose(y[:, :rows], wanted, atol=2e-5, err_msg=f"{n} rows")
