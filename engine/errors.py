"""Every error that the engine raises, each mapped once to an HTTP status.

    EngineError                 500
    ├── PackageInvalid          500  the package is incomplete, altered or built for something else
    ├── InvalidRequest          400  a request that can never succeed as it is
    │   └── (context overflow is an InvalidRequest with code context_length_exceeded)
    ├── UnknownModel            404  a request for a model that is not here
    ├── Overloaded              429  the queue is full; try again later
    ├── EngineStopped           503  the engine is shutting down or has died
    ├── DeadlineExceeded        504  a reply has taken longer than its request allows
    ├── InvalidSetting               a setting that does not exist or a value that does not fit it
    ├── DoesNotFit                   weights and KV cache together want more memory than they may take
    └── CannotListen                 the server's address is taken or not ours

The last three are for whoever starts the server, and never reach a client.
"""

from __future__ import annotations


class EngineError(Exception):
    """Base of all engine errors: `message` says what, `hint` what to do, `code` is OpenAI's error code."""

    status = 500
    kind = "server_error"
    usual_code: str | None = None

    def __init__(self, message: str, *, hint: str = "", code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code or self.usual_code
        self.param = param

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


class PackageInvalid(EngineError):
    """The package is incomplete, altered, or built for another TVM, ABI or processor."""


class InvalidRequest(EngineError):
    """A request that can never succeed as it is."""

    status = 400
    kind = "invalid_request_error"


class UnknownModel(EngineError):
    """A request for a model that is not here."""

    status = 404
    kind = "invalid_request_error"


class Overloaded(EngineError):
    """The queue is full."""

    status = 429
    kind = "rate_limit_error"
    usual_code = "rate_limit_exceeded"


class EngineStopped(EngineError):
    """The engine is shutting down or has died."""

    status = 503
    kind = "server_error"
    usual_code = "service_unavailable"


class DeadlineExceeded(EngineError):
    """A reply has taken longer than its request allows."""

    status = 504


class InvalidSetting(EngineError):
    """A setting that does not exist, or a value that does not fit it."""


class DoesNotFit(EngineError):
    """Weights, workspace and KV cache together want more memory than they may take."""


class CannotListen(EngineError):
    """The server's address is taken, or not an address of this machine."""


class ServerUnusable(EngineError):
    """A server that is to be measured does not answer, or not as one that speaks OpenAI's protocol."""
