"""Our passes and the memory estimate on tiny modules, and what the pipeline promises."""

from __future__ import annotations

import inspect
import struct
from pathlib import Path
from typing import Any

import pytest
import tvm
import tvm_ffi
from tvm import IRModule, relax, te, tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from mlcbuild.compiler import build
from mlcbuild.compiler.cheap_stack import cheap_stack
from mlcbuild.compiler.fatbin import MAGIC, check_fat_binary, list_cubins
from mlcbuild.compiler.gpu import Linear
from mlcbuild.compiler.memory import estimate_memory
from mlcbuild.compiler.passes.attach_metadata import attach_metadata
from mlcbuild.compiler.passes.check_scheduled import check_scheduled, has_thread_binding
from mlcbuild.compiler.passes.order_shapes import sort_stores
from mlcbuild.compiler.passes.set_bounds import set_bounds
from mlcbuild.compiler.passes.specialize_low_batch import BUCKETS, specialize_low_batch
from mlcbuild.compiler.pipeline import PLAN, make_pipeline, run_pipeline
from mlcbuild.errors import CompileError
from mlcbuild.graph.command import Terminated
from mlcbuild.recipes.schema import Limits, Quantization, Target

CPU = Target(name="cpu", kind="cpu", arch="x86_64", tvm={"kind": "llvm"}, layouts=["rows16"])
SM90 = {
    "kind": "cuda",
    "arch": "sm_90",
    "max_num_threads": 1024,
    "max_threads_per_block": 1024,
    "thread_warp_size": 32,
    "max_shared_memory_per_block": 49152,
}
CUDA = Target(name="cuda", kind="cuda", arch="x86_64", tvm=SM90, layouts=["canonical"])
FOUR_BIT = Quantization(name="q4f16_1", method="group", bits=4, group_size=32, dtype="float16")


class Doubler(nn.Module):
    """Two kernels with a tensor between them."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = op.tensor_expr_op(lambda x: te.compute(x.shape, lambda *i: x(*i) * 2.0, name="double"), "double", [x])
        return x


def export(model: nn.Module, width: int, dtype: str = "float32") -> IRModule:
    """forward(x [n, width])."""
    spec = {"forward": {"x": nn.spec.Tensor(["n", width], dtype), "$": {"param_mode": "packed", "effect_mode": "none"}}}
    return model.export_tvm(spec=nn.spec.ModuleSpec.from_raw(spec, model))[0]


def plan(module: IRModule) -> IRModule:
    for name in PLAN:
        module = getattr(relax.transform, name)()(module)
    return module


def ignore(*_: Any) -> None:
    pass


def test_memory_of_a_plan_with_and_without_bounds() -> None:
    module, bounds = export(Doubler(), 16), {"n": 64}
    tensor = 64 * 16 * 4
    assert estimate_memory(plan(set_bounds(module, bounds)), bounds) == {"forward": 2 * tensor}
    assert estimate_memory(plan(module), bounds) == {"forward": 2 * tensor}
    assert estimate_memory(plan(module), {"n": 1}) == {"forward": 2 * 16 * 4}


def test_size_without_a_bound_is_named() -> None:
    with pytest.raises(CompileError) as caught:
        estimate_memory(plan(export(Doubler(), 16)), {})
    assert str(caught.value) == (
        "function 'forward' allocates a tensor whose size depends on 'n', which has no bound\n"
        "  hint: add 'n' to Program.bounds where the target's lowering exports the model"
    )


def test_set_bounds_leaves_its_argument_alone() -> None:
    module = export(Doubler(), 16)
    assert dict(set_bounds(module, {"n": 4})["forward"].attrs["tir_var_upper_bound"]) == {"n": 4}
    assert "tir_var_upper_bound" not in module["forward"].attrs


def test_library_says_what_describe_returns() -> None:
    where = tvm.target.Target(CPU.tvm)
    stages = make_pipeline(CPU, {"n": 8}, lambda module: f"memory {estimate_memory(module, {'n': 8})['forward']} é")
    module, seconds = run_pipeline(export(Doubler(), 16), stages, where, ignore)
    assert list(seconds) == [stage.name for stage in stages]
    machine = relax.VirtualMachine(tvm.compile(module, where, relax_pipeline=None), tvm.cpu())
    assert machine["_metadata"]() == f"memory {2 * 8 * 16 * 4} é"


def test_attach_metadata_keeps_the_functions() -> None:
    module = attach_metadata(export(Doubler(), 16), "{}")
    assert {name.name_hint for name in module.get_global_vars()} >= {"forward", "_metadata"}


SHAPES = """
@T.prim_func(s_tir=True)
def {name}(H: T.Buffer((T.int64(4),), "int64")):
    T.func_attr({{"tirx.is_host_func": True}})
    {stores}
"""


def make_shapes(name: str, *stores: str) -> tirx.PrimFunc:
    return tvm.script.from_source(SHAPES.format(name=name, stores="\n    ".join(stores)))


def test_stores_of_sizes_are_sorted() -> None:
    stores = ["H[T.int64(1)] = H[T.int64(0)] * T.int64(8)", "H[T.int64(2)] = H[T.int64(0)] * T.int64(4)"]
    one, other = make_shapes("shape_func", *stores), make_shapes("shape_func", *reversed(stores))
    assert one.script() != other.script()
    assert sort_stores(other, "shape_func").script() == sort_stores(one, "shape_func").script() == one.script()
    dependent = make_shapes("shape_func1", stores[0], "H[T.int64(2)] = H[T.int64(1)] * T.int64(4)")
    with pytest.raises(CompileError, match="shape_func1 reads a size that it computes"):
        sort_stores(dependent, "shape_func1")


def test_pipeline_reports_each_stage() -> None:
    heard: list[tuple[str, float]] = []
    stages = make_pipeline(CPU, {"n": 8}, lambda module: "{}")
    where = tvm.target.Target(CPU.tvm)
    run_pipeline(export(Doubler(), 16), stages, where, lambda text, part: heard.append((text, part)))
    assert [text for text, _ in heard] == [f"pass {stage.name}" for stage in stages]
    assert [part for _, part in heard] == [i / len(stages) for i in range(len(stages))]


def test_unscheduled_kernel_is_refused_by_name() -> None:
    with pytest.raises(CompileError) as caught:
        check_scheduled(export(Doubler(), 16))
    assert caught.value.message == "no schedule rule applies to: double"


def make_matmul(residual: bool) -> tirx.PrimFunc:
    """The only kernel of a 4-bit layer of 256 x 128."""

    class Layer(Linear):
        def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
            return super().forward(x, x if with_residual else None)

    with_residual = residual
    module = export(Layer(128, 128, FOUR_BIT), 128, "float16")
    (kernel,) = [f for f in module.functions.values() if isinstance(f, tirx.PrimFunc)]
    return kernel


@pytest.mark.parametrize("residual", [False, True])
def test_matmul_dequantizes_inside_and_gets_a_kernel_per_bucket(residual: bool) -> None:
    module = IRModule({"matmul": make_matmul(residual)})
    with tvm.target.Target(SM90), cheap_stack():
        scheduled = specialize_low_batch(module)
    assert not has_thread_binding(module["matmul"])
    assert check_scheduled(scheduled) is scheduled
    assert scheduled["matmul"].attrs["tirx.is_scheduled"]
    text = scheduled["matmul"].script()
    assert text.count("if T.tvm_thread_invariant(n <=") == len(BUCKETS)
    assert text.count('thread="blockIdx.z"') == 1  # the one for many rows
    assert "wmma" in text  # on tensor cores
    # no buffer in global memory: the weights are dequantized on the way
    buffers = [line for line in text.splitlines() if "T.sblock_alloc_buffer(" in line]
    assert buffers
    assert [line for line in buffers if "scope=" not in line] == []


def test_other_kernels_are_left_to_the_rules_that_follow() -> None:
    module = export(Doubler(), 16)
    with tvm.target.Target(SM90):
        assert not has_thread_binding(specialize_low_batch(module)["double"])


def test_pipeline_of_a_gpu_schedules_everything() -> None:
    where = tvm.target.Target(SM90)
    with cheap_stack():
        module, _ = run_pipeline(
            export(Doubler(), 64), make_pipeline(CUDA, {"n": 8}, lambda module: "{}"), where, ignore
        )
    (kernel,) = [f for f in module.functions.values() if isinstance(f, tirx.PrimFunc) and "double" in f.script()]
    assert has_thread_binding(kernel)


def test_cheap_stack_is_inspects() -> None:
    def ask() -> list[inspect.FrameInfo]:
        return inspect.stack()

    original = inspect.stack
    with cheap_stack():
        cheap = ask()
        assert inspect.stack is not original
    assert inspect.stack is original
    full = ask()
    assert [f.function for f in cheap] == [f.function for f in full]
    assert [f.filename for f in cheap] == [f.filename for f in full]
    assert cheap[0].code_context == full[0].code_context
    assert cheap[1].frame is inspect.currentframe()


def make_fat_binary(*entries: tuple[int, int]) -> bytes:
    """A fat binary with entries of (kind, architecture) and some content."""
    content = b""
    for kind, arch in entries:
        content += struct.pack("<HHIQ12xI32x", kind, 257, 64, 8, arch) + b"\x7fELF1234"
    return MAGIC + struct.pack("<HHQ", 1, 16, len(content)) + content


def test_cubins_are_found_anywhere_and_ptx_is_not_one() -> None:
    data = b"abc" + make_fat_binary((2, 90), (1, 90), (2, 80)) + b"xyz" + make_fat_binary((2, 120))
    assert list_cubins(data) == [90, 80, 120]
    assert list_cubins(b"nothing here") == []
    assert list_cubins(data[:40]) == []  # cut short


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (make_fat_binary((2, 80)), "lib.so should hold machine code for sm_90, and holds sm_80"),
        (make_fat_binary((1, 90)), "lib.so should hold machine code for sm_90, and holds no machine code"),
        (b'extern "C" __global__ void', "lib.so holds CUDA source code instead of machine code"),
    ],
)
def test_library_without_the_right_machine_code_is_refused(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "lib.so").write_bytes(data)
    with pytest.raises(CompileError) as caught:
        check_fat_binary(tmp_path / "lib.so", "sm_90")
    assert caught.value.message == message


def test_right_machine_code_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "lib.so").write_bytes(make_fat_binary((2, 90)))
    check_fat_binary(tmp_path / "lib.so", "sm_90a")


@pytest.mark.parametrize("kind", [KeyboardInterrupt, Terminated])
def test_an_interrupt_within_tvm_is_one(
    kind: type[KeyboardInterrupt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal may come while TVM calls a pass of ours: the build then ends as at any other moment."""

    def interrupt() -> None:
        raise kind

    monkeypatch.setattr(build, "make_tvm_target", lambda target: tvm_ffi.convert(interrupt)())
    limits = Limits(context_window=64, prefill_chunk=16, max_batch=2)
    with pytest.raises(kind):
        build.build_library("llama", {}, FOUR_BIT, CPU, limits, "rows16", tmp_path, lambda text, fraction: None)
