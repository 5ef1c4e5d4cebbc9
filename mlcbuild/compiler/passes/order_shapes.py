"""Put the arithmetic on symbolic sizes in a fixed order: TVM's follows the addresses of objects in memory.

VMShapeLower makes functions `shape_func*` of stores `H[slot] = expression`. The order of the stores, and with it how
many functions there are and what they are called, differs from process to process, and so would libraries.
"""

from __future__ import annotations

from tvm import IRModule, relax, tirx
from tvm.ir.expr import GlobalVar, TensorLoad
from tvm_ffi import structural_walk

from mlcbuild.errors import CompileError

NAME = "shape_func"


def order_shapes(module: IRModule) -> IRModule:
    """Sort the stores of each shape function by slot, keep one of equal functions, and name them in order of use.

    CompileError when a store reads a slot that the same function writes, since the order would then matter.
    """
    functions = {name.name_hint: (name, function) for name, function in module.functions_items()}
    shapes = {name: pair for name, pair in functions.items() if name.startswith(NAME)}
    renamer = _Renamer(shapes)
    ordered = IRModule(attrs=module.attrs, global_infos=module.global_infos)
    for name in sorted(functions.keys() - shapes.keys()):
        variable, function = functions[name]
        ordered[variable] = renamer.visit_expr(function) if isinstance(function, relax.Function) else function
    for variable, function in renamer.made.values():
        ordered[variable] = function
    return ordered


def sort_stores(function: tirx.PrimFunc, name: str) -> tirx.PrimFunc:
    """The shape function with its stores in order of their slots."""
    body = function.body
    stores = {int(store.indices[0]): store for store in (body.seq if isinstance(body, tirx.SeqStmt) else [body])}
    read: set[int] = set()
    for store in stores.values():
        structural_walk(store.value, (TensorLoad, lambda load: read.add(int(load.indices[0]))), order="pre")
    if read & stores.keys():
        raise CompileError(f"{name} reads a size that it computes", hint="mend order_shapes.py, which cannot sort it")
    ordered = [stores[slot] for slot in sorted(stores)]
    return function.with_body(tirx.SeqStmt(ordered) if len(ordered) > 1 else ordered[0])


@relax.expr_functor.mutator
class _Renamer(relax.PyExprMutator):
    """Hands out the names of the shape functions anew, in the order of the calls."""

    def __init__(self, shapes: dict[str, tuple[GlobalVar, tirx.PrimFunc]]) -> None:
        super().__init__()
        self.sorted = {name: sort_stores(function, name) for name, (_, function) in shapes.items()}
        self.free = [shapes[name][0] for name in sorted(shapes, key=lambda name: (len(name), name))]
        self.made: dict[str, tuple[GlobalVar, tirx.PrimFunc]] = {}  # by the function's text

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        if not isinstance(call.op, GlobalVar) or call.op.name_hint not in self.sorted:
            return call
        function = self.sorted[call.op.name_hint]
        text = function.script()
        if text not in self.made:
            self.made[text] = self.free[len(self.made)], function
        return relax.Call(self.made[text][0], call.args, call.attrs, call.ty_args, call.span, call.ty)
