"""A model and the small one that drafts for it: what must be alike, and loading both within one budget."""

from __future__ import annotations

from engine.artifact import TOKENIZER, Package
from engine.core import Limits
from engine.errors import InvalidSetting
from engine.runtime.memory import Budget
from engine.runtime.tvm_executor import TvmExecutor


def load_pair(package: Package, draft: Package, budget: Budget) -> tuple[TvmExecutor, TvmExecutor]:
    """Executors of both, with pages of the same numbers. Raises InvalidSetting for a draft that is of no use here.

    Also what TvmExecutor raises, DoesNotFit of both together.
    """
    check_alike(package, draft)
    executor = TvmExecutor(package, budget, draft=draft)
    try:
        check_context(draft, executor.limits)
        return executor, TvmExecutor(draft, limits=executor.limits)
    except BaseException:
        executor.close()
        raise


def check_alike(package: Package, draft: Package) -> None:
    """Both must have the same tokens and pages: guesses are token ids, and pages are shared by number."""
    digests = [[f.sha256 for f in p.manifest.files if f.path == TOKENIZER] for p in (package, draft)]
    libraries = [p.manifest.library for p in (package, draft)]
    if digests[0] != digests[1] or libraries[0].vocab_size != libraries[1].vocab_size:
        raise _refuse(draft, f"its tokenizer is not that of {package.manifest.variant}")
    sizes = [(library.kv.kind, library.kv.page_size) for library in libraries]
    if sizes[0] != sizes[1]:
        raise _refuse(draft, f"its KV cache has {sizes[1]} pages, that of {package.manifest.variant} {sizes[0]}")


def check_context(draft: Package, limits: Limits) -> None:
    """The draft model must hold every text that the large one holds."""
    context = draft.manifest.library.limits.context_window
    if context < limits.context_window:
        raise _refuse(draft, f"its context holds {context} tokens, and the engine's {limits.context_window}")


def _refuse(draft: Package, reason: str) -> InvalidSetting:
    return InvalidSetting(
        f"draft={draft.root.name}: this package cannot draft here: {reason}",
        hint="give a smaller model of the same family, or speculative=lookup, which needs none",
    )
