"""Reading memory and nothing else: the roofline that a decode step is measured against."""

from __future__ import annotations

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from mlcbuild.compiler.kernels import tir
from mlcbuild.compiler.kernels.tir import I32, Accumulator, spread, vec

CHAINS = 9  # with fewer independent sums the loop is bound by their latency and flatters every ratio
STEP = CHAINS * 64


def make_read(tasks: int) -> tirx.PrimFunc:
    """(data uint8 [n], sums int32 [tasks, 16]): each task reads its share, n // tasks rounded down to 576 bytes."""

    def body() -> None:
        n = tir.size("n")
        data, sums = tir.arg("data", (n,), "uint8"), tir.arg("sums", (tasks, 16), "int32")
        with tir.root():
            tir.begin()
            steps = n // tasks // STEP
            with T.parallel(tasks) as task:
                chains = [Accumulator(spread(T.int32(0)), "int32") for _ in range(CHAINS)]
                with T.serial(steps) as i:
                    for j, chain in enumerate(chains):
                        line = T.reinterpret(I32, vec(data, (task * steps + i) * STEP + j * 64, 64))
                        chain.set(chain.get() + line)
                total = sum((c.get() for c in chains[1:]), chains[0].get())
                tir.put2(sums, task, 0, total)

    return tir.make_prim_func(body)
