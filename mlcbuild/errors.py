"""Every error that mlcbuild raises for a mistake that a person can mend.

    MlcbuildError
    ├── RecipeError         a recipe file cannot be read or does not make sense (file:line:col)
    ├── UnknownNameError    a model, quantization, target, matrix or variable that does not exist
    ├── DownloadError       a source could not be fetched
    ├── WeightError         a checkpoint is missing tensors, has wrong shapes, or is damaged
    ├── ToolchainError      a program that a target needs is not on this machine
    ├── CompileError        the compiler could not make a library
    ├── PackageError        a package could not be written
    ├── QualityError        a package fails the gate of its model recipe
    ├── StepError           a step of tasks/ broke its contract: no `run`, an output missing, an input not made
    ├── StoreError          the content store cannot be read or written
    └── ExecutorError       executor=dask: no scheduler, no worker that fits, or one that would make something else

Each carries a hint: what to do next, if possible a command to paste.
"""

from __future__ import annotations


class MlcbuildError(Exception):
    """A mistake outside our code: `message` says what and where, `hint` what to do."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


class RecipeError(MlcbuildError):
    """A recipe file cannot be read or does not make sense."""


class UnknownNameError(MlcbuildError):
    """A name on the command line matches no recipe or variable."""


class DownloadError(MlcbuildError):
    """A source could not be fetched."""


class WeightError(MlcbuildError):
    """A checkpoint is incomplete, damaged or of another shape than its configuration says."""


class ToolchainError(MlcbuildError):
    """A program or library that a target needs is not on this machine."""


class CompileError(MlcbuildError):
    """The compiler could not make a library."""


class PackageError(MlcbuildError):
    """A package could not be written."""


class QualityError(MlcbuildError):
    """A package fails the gate of its model recipe."""


class StepError(MlcbuildError):
    """A step broke its contract: no `run`, a declared output missing, or an input that nothing made."""


class ExecutorError(MlcbuildError):
    """Steps cannot be run by the workers of a Dask scheduler."""


class StoreError(MlcbuildError):
    """The content store cannot be read or written."""
