"""The program that GPU targets compile, run on a CPU against transformers' logits and numpy: numbers without a GPU.

Same family, same tensor expressions, same exported functions; TVM's KV cache takes its CPU kernels for an llvm target,
and the GPU's schedules are left out. What this cannot show is whether dlight's schedules compute the same. One bug of
TVM is not met here: its CPU branch hands the cache the two token-tree kernels in swapped order, so token trees fail
there; batch_verify of a chain, as below, does not use them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from reference_cases import CASES, LENGTH, load_recorded, make_tokens, write_checkpoint
from small_packages import LIMITS, be_quiet, get_recipes
from test_logits import compute_dequantized

from mlcbuild.errors import CompileError
from mlcbuild.quality.measure import compute_divergence, log_softmax

FLOAT_ERROR = 1e-4
FOUR_BIT_ERROR = 1e-3
HALF_KL = 1e-5  # nats per token, float16 activations and KV pages against float32
OFF_GPU = {"SpecializeLowBatch", "ApplyDefaultSchedule", "CheckScheduled"}  # stages that need a GPU target
SKIPPED = 18  # the token whose logits no call asks for
ASKED = np.delete(np.arange(LENGTH), SKIPPED)
SIZES = (LIMITS.max_batch, 256, LIMITS.prefill_chunk, 16, 0)  # sequences, tokens, chunk, page, sliding window


class Runner:
    """The compiled functions with their weights and one KV cache, driven as MLC's engine does."""

    def __init__(self, case: str, quantization: str, folder: Path) -> None:
        import tvm
        from tvm import relax

        from mlcbuild.weights.convert import convert_weights
        from mlcbuild.weights.shards import open_shards

        config = write_checkpoint(case, folder / "source")
        q = get_recipes().quantizations[quantization]
        convert_weights(folder / "source", folder / "weights", config["model_type"], q, "canonical", be_quiet)
        executable, names = compile_for_cpu(config, quantization)
        shards = open_shards(folder / "weights")
        assert sorted(names) == sorted(shards.names())
        self.params = [tvm.runtime.tensor(np.ascontiguousarray(shards.read(name))) for name in names]
        self.machine = relax.VirtualMachine(executable, tvm.cpu())
        self.shape, self.tensor = tvm.runtime.ShapeTuple, tvm.runtime.tensor
        self.vocab = config["vocab_size"]
        self.cache = self.machine["create_paged_kv_cache"](*[self.shape([size]) for size in SIZES])

    def state(self, name: str, *args: Any) -> None:
        import tvm

        tvm.get_global_func(f"vm.builtin.kv_state_{name}")(self.cache, *args)

    def call(self, name: str, shares: dict[int, NDArray[np.int32]], *extra: Any) -> NDArray[np.float32]:
        """Run `name` over the new tokens of some sequences; logits [rows, vocab]."""
        tokens = np.concatenate(list(shares.values()))
        embeds = self.machine["embed"](self.tensor(tokens), self.params)
        flat = (len(tokens), 1) if name == "batch_decode" else (1, len(tokens))
        embeds = embeds._create_view((*flat, embeds.shape[1]))
        self.state("begin_forward", self.shape(list(shares)), self.shape([len(t) for t in shares.values()]))
        logits, _ = self.machine[name](embeds, *extra, self.cache, self.params)
        self.state("end_forward")
        found: NDArray[np.float32] = logits.numpy()
        return found.reshape(-1, found.shape[-1])

    def run(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        """Logits [LENGTH, vocab] of sequence 1 beside another one: verify, prefill, verify, decode; SKIPPED is NaN."""
        other, vocab = tokens[::-1].copy(), self.vocab
        result = np.full((len(tokens), vocab), np.nan, np.float32)
        self.state("add_sequence", 0)
        self.state("add_sequence", 1)
        result[:18] = self.call("batch_verify", {0: other[:3], 1: tokens[:18]})[3:]
        wanted = self.tensor(np.array([1, 3], np.int32))
        found = self.call("batch_prefill", {0: other[3:5], 1: tokens[18:20]}, wanted)
        result[19] = found[1]
        result[20:30] = self.call("batch_verify", {1: tokens[20:30]})
        for i in range(30, len(tokens)):
            result[i] = self.call("batch_decode", {0: other[i - 25 : i - 24], 1: tokens[i : i + 1]})[1]
        return result


def compile_for_cpu(config: dict[str, Any], quantization: str) -> tuple[Any, list[str]]:
    """The CUDA target's program as an executable for this processor, and its parameters' names."""
    import tvm

    from mlcbuild.compiler.cheap_stack import cheap_stack
    from mlcbuild.compiler.lowering import make_lowering
    from mlcbuild.compiler.pipeline import make_pipeline, run_pipeline
    from mlcbuild.models import get_family

    recipes = get_recipes()
    target, where = recipes.targets["cuda-sm90"], tvm.target.Target({"kind": "llvm"})
    family = get_family(config["model_type"])
    shape = family.Config.from_hf(config)
    lowering = make_lowering(target, recipes.quantizations[quantization], "canonical")
    with where, cheap_stack():
        sizes = shape.hidden_size, shape.vocab_size
        program = lowering.export(family.Model(shape, lowering), shape.attention, sizes, LIMITS)
    stages = make_pipeline(target, program.bounds, lambda module: "{}")
    assert {stage.name for stage in stages} > OFF_GPU
    stages = [stage for stage in stages if stage.name not in OFF_GPU]
    module, _ = run_pipeline(program.module, stages, where, be_quiet)
    return tvm.compile(module, where, relax_pipeline=None), [name for name, _, _ in program.params]


def check(found: NDArray[np.float32], wanted: NDArray[np.float32], most: float) -> None:
    """Every logit that was asked for is within `most`."""
    assert np.isnan(found[SKIPPED]).all()
    assert np.abs(found[ASKED] - wanted[ASKED]).max() < most


def test_int8_pages_are_refused() -> None:
    from mlcbuild.compiler.lowering import make_lowering

    recipes = get_recipes()
    with pytest.raises(CompileError) as caught:
        make_lowering(recipes.targets["cuda-sm90"], recipes.quantizations["q4f16_1_kv8"], "canonical")
    assert str(caught.value) == (
        "quantization q4f16_1_kv8: kv: int8 is implemented for CPU targets only\n"
        "  hint: choose another quantization, or a target of kind cpu"
    )


@pytest.fixture(autouse=True)
def few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVM_NUM_THREADS", "2")


@pytest.mark.parametrize("case", CASES)
def test_float_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    found = Runner(case, "q0f32", tmp_path).run(make_tokens(CASES[case]))
    check(found, load_recorded(case), FLOAT_ERROR)


def test_four_bit_logits_equal_dequantized_weights(tmp_path: Path) -> None:
    case = "qwen2-untied"
    found = Runner(case, "q4f32_1", tmp_path).run(make_tokens(CASES[case]))
    check(found, compute_dequantized(case, "q4f32_1", tmp_path / "source"), FOUR_BIT_ERROR)


@pytest.mark.parametrize("quantization", ["q4f16_1", "q8f16_1"])
def test_half_precision_stays_close(quantization: str, tmp_path: Path) -> None:
    case = "llama-tied-llama3-rope"
    found = Runner(case, quantization, tmp_path).run(make_tokens(CASES[case]))[ASKED]
    wanted = compute_dequantized(case, quantization, tmp_path / "source")[ASKED]
    assert compute_divergence(log_softmax(wanted), log_softmax(found)).kl < HALF_KL


def test_unknown_rotary_scaling_is_refused() -> None:
    from mlcbuild.compiler.gpu import make_rope_kernel
    from mlcbuild.compiler.lowering import AttentionShape

    shape = AttentionShape(1, 4, 2, 32, 10000.0, {"rope_type": "yarn", "factor": 4.0})
    with pytest.raises(CompileError, match=r"^rope_type 'yarn' is not implemented for GPU targets"):
        make_rope_kernel(shape, "float32")
