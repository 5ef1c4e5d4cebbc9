"""The CPU kernels compiled for ARM and run under qemu, against the same numpy as here; needs a cross compiler."""

from __future__ import annotations

import re
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

from engine.machine import get_cpu_features
from mlcbuild.compiler.kernels import linear_dot, quantize_rows
from mlcbuild.quantization.group import get_zero
from mlcbuild.recipes.load import load_recipes

ROOT = Path(__file__).parents[2]
COMPILER, DISASSEMBLER, EMULATOR = "aarch64-linux-gnu-gcc", "aarch64-linux-gnu-objdump", "qemu-aarch64"
# Each has what its target requires, and no more where qemu knows such a one
PROCESSORS = {"aarch64": "cortex-a72", "aarch64-dotprod": "neoverse-n1", "aarch64-i8mm": "max"}
CODES = {"i": 0, "u": 1, "f": 2}  # DLPack's

pytestmark = pytest.mark.skipif(
    not (shutil.which(COMPILER) and shutil.which(EMULATOR)), reason=f"no {COMPILER} or no {EMULATOR} on PATH"
)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(params=["aarch64", "aarch64-dotprod"])
def target(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def build(target: str, tmp_path: Path) -> Callable[[Any], Callable[..., None]]:
    """As test_kernels.build, for ARM."""
    made: list[Path] = []

    def build(kernel: Any, _target: str | None = None) -> Callable[..., None]:
        name = tmp_path / f"kernel{len(made)}"
        made.append(name)
        write_object(kernel, target, f"{name}.o")
        main = Path(__file__).with_name("arm_main.c")
        subprocess.run([COMPILER, "-O1", "-static", str(main), f"{name}.o", "-lm", "-o", str(name)], check=True)
        return lambda *args: run(name, args, PROCESSORS[target])

    return build


def write_object(kernel: Any, target: str, path: str) -> None:
    made = tvm.target.Target(load_recipes(ROOT / "recipes").targets[target].tvm)
    module = tvm.IRModule({"f": kernel.with_attr("global_symbol", "f")})
    tvm.compile(module, made).mod.write_to_file(path, "o")


def run(program: Path, args: tuple[Any, ...], processor: str) -> None:
    """Arrays change in place."""
    words = [struct.pack("<i", len(args))]
    for a in args:
        if isinstance(a, np.ndarray):
            words.append(struct.pack(f"<3i{a.ndim}q", a.ndim, CODES[a.dtype.kind], a.itemsize * 8, *a.shape))
            words.append(a.tobytes())
        else:
            words.append(struct.pack("<3iq", -1, 0, 64, a))
    command = [EMULATOR, "-cpu", processor, str(program)]
    done = subprocess.run(command, input=b"".join(words), capture_output=True, check=False)
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
    monkeypatch.setattr(attention, "HAS_VNNI", False)
    attention.test_attention_over_pages(rng, dtype, 8, 2, 64)


def test_sampling(monkeypatch: pytest.MonkeyPatch, build: Any, rng: np.random.Generator) -> None:
    monkeypatch.setattr(sampling, "build", build)
    sampling.test_tokens_lie_where_the_draw_says(rng, None, 1000)
    sampling.test_unusable_rows_hurt_no_other(rng)
    sampling.test_more_weights_near_the_edge_than_a_list_holds(rng, monkeypatch)


@pytest.mark.parametrize("q", [kernels.Q4F16, kernels.Q8F16, kernels.Q0F16, kernels.Q0BF16], ids=lambda q: q.name)
def test_linear_rows16(monkeypatch: pytest.MonkeyPatch, build: Any, rng: np.random.Generator, q: Any) -> None:
    monkeypatch.setattr(kernels, "build", build)
    kernels.test_linear_rows16(rng, q, 40, False, True)


DOTS = {"aarch64-dotprod": "asimddp", "aarch64-i8mm": "i8mm"}


def compute(
    build: Any, q: Any, dot: linear_dot.Dot, shape: tuple[int, int], *, bias: bool, residual: bool
) -> list[np.ndarray[Any, Any]]:
    """The results of a matmul for several numbers of rows, compared with numpy's."""
    (rows, width), rng, results = shape, np.random.default_rng(0), []
    packed, dense = kernels.make_weights(rng, q, "int8-16x64", shape)
    quantizer = build(quantize_rows.make_quantize_rows(width, zero=get_zero(q.bits)))
    kernel = build(linear_dot.make_linear(rows, width, dot, bits=q.bits, bias=bias, residual=residual))
    shift = rng.normal(size=rows).astype(np.float32)
    for n in (1, 2, 5, 67):
        x, y = rng.normal(size=(n, width)).astype(np.float32), np.full((n, -(-rows // 16) * 16), 2, np.float32)
        x[0, :32] = 1  # all codes 127, the largest sum
        acts = kernels.codes_for(n, width)
        wanted = kernels.quantize(x) @ dense.T + (shift if bias else 0) + (2 if residual else 0)
        quantizer(x, *acts)
        kernel(*packed, *acts, *([shift] if bias else []), y)
        np.testing.assert_allclose(y[:, :rows], wanted, atol=2e-5, err_msg=f"{n} rows")
        results.append(y[:, :rows])
    return results


@pytest.mark.parametrize("target", DOTS, indirect=True)
@pytest.mark.parametrize("q", kernels.BYTES, ids=lambda q: q.name)
@pytest.mark.parametrize(("shape", "bias", "residual"), [((40, 160), False, True), ((48, 64), True, False)])
def test_linear_with_products_of_bytes(
    build: Any, target: str, q: Any, shape: tuple[int, int], bias: bool, residual: bool
) -> None:
    """Right, and to the last bit what the processor here makes of it."""
    results = compute(build, q, linear_dot.DOTS[DOTS[target]], shape, bias=bias, residual=residual)
    dot = linear_dot.choose_dot(get_cpu_features() or ())
    assert dot is not None
    here = compute(kernels.build, q, dot, shape, bias=bias, residual=residual)
    for ours, other in zip(results, here, strict=True):
        np.testing.assert_array_equal(ours, other)


@pytest.mark.parametrize("q", kernels.BYTES, ids=lambda q: q.name)
def test_loops_over_rows_hold_what_they_must(tmp_path: Path, q: Any) -> None:
    """Weights stay in registers, and a matrix product does the work of two dot products. Timing it takes such an ARM;
    llvm-mca says 35 products a cycle of Neoverse V1 for `sdot` and 50 for `usmmla`."""
    for target, instruction, products in (("aarch64-dotprod", "sdot", 16), ("aarch64-i8mm", "usmmla", 32)):
        kernel = linear_dot.make_linear(
            256, 256, linear_dot.DOTS[DOTS[target]], bits=q.bits, bias=False, residual=False
        )
        write_object(kernel, target, str(tmp_path / "kernel.o"))
        loops = [loop for loop in list_loops(tmp_path / "kernel.o") if loop.count(instruction) == 16]
        assert len(loops) == 4, target  # even and odd groups, two halves of a tile
        for loop in loops:
            assert "sp" not in loop, "something was spilled"
            assert 16 * products / loop.count("\n") > {"sdot": 7, "usmmla": 9.5}[instruction]


def list_loops(path: Path) -> list[str]:
    """The innermost loops of an object, one instruction a line, without addresses."""
    done = subprocess.run([DISASSEMBLER, "-d", "--no-show-raw-insn", str(path)], capture_output=True, check=True)
    lines = re.findall(r"^ +([0-9a-f]+):\t(.+)$", done.stdout.decode(), re.MULTILINE)
    places, loops = {address: i for i, (address, _) in enumerate(lines)}, []
    for end, (_, text) in enumerate(lines):
        found = re.match(r"b\.\w+\t([0-9a-f]+)", text)
        if found and (begin := places.get(found[1], end)) < end:
            loops.append((begin, end))
    inner = [
        (b, e) for b, e in loops if not any((b, e) != other and b <= other[0] and other[1] <= e for other in loops)
    ]
    return ["".join(f"{text}\n" for _, text in lines[b : e + 1]) for b, e in inner]
