"""The engine for other languages: JSON texts in, JSON texts out, and a callback for what comes later.

In a process that embeds Python (PyObject_Call in C, pyo3, PythonKit, JEP, ...), where strings are all that crosses:

    engine = JsonEngine(callback)                  callback(text) is called from other threads, one call at a time
    engine.reload('{"model": "artifacts/packages/tiny-q4f16_1-x86-64-v4"}')          -> '{}' or '{"error": {...}}'
    engine.chat_completion('{"messages": [...], "stream": true}', "my-id")           -> '{}' or '{"error": {...}}'
    engine.abort("my-id")  engine.stats()  engine.unload()                           -> likewise

From any language that can start a process, with the same calls as lines: `python -m engine.json_ffi` reads

    {"call": "reload", "config": {"model": "artifacts/packages/..."}}
    {"call": "chat_completion", "id": "my-id", "request": {"messages": [{"role": "user", "content": "Hi"}]}}
    {"call": "abort", "id": "my-id"}       {"call": "stats"}       {"call": "unload"}

and writes a line for each call, in order, `{"result": ...}`, and between them what the callback gets: for each request
that was accepted some objects with its `id`, of which the last one, and only that, has `"last": true`:

    {"id": "my-id", "chunk": {...}}                       OpenAI's chat.completion.chunk, when the request has "stream"
    {"id": "my-id", "answer": {...}, "last": true}        OpenAI's chat.completion, when it has not
    {"id": "my-id", "last": true}                         the end of a stream, or of what was aborted
    {"id": "my-id", "error": {...}, "last": true}         OpenAI's error, as over HTTP

`config` has `model`, the package's folder, and may have mode, kv_tokens, memory_fraction, prefix_cache, cache_file,
speculative, draft, draft_tokens, max_queue and model_name, as `./doit help serve` explains them. Texts are UTF-8, lines
have no line feed inside. No call raises, and none but reload and unload takes long.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from engine.errors import EngineError, EngineStopped, InvalidRequest, InvalidSetting
from engine.model import LoadedModel, load_model
from engine.openai_api import Job, make_job
from engine.reply import Reply
from engine.runtime.memory import Budget
from engine.server.protocol.errors import make_engine_error, make_error
from engine.server.settings import ServerSettings, get_guessing, load_settings

SETTINGS = (
    *("mode", "kv_tokens", "memory_fraction", "prefix_cache", "cache_file"),
    *("speculative", "draft", "draft_tokens", "max_queue", "model_name"),
)
_log = logging.getLogger(__name__)


class JsonEngine:
    """At most one model at a time. `callback` takes a JSON text; one that raises ends the request that it was for.

    Every method may be called from any thread, but not `unload` and `reload` from within the callback.
    """

    def __init__(self, callback: Callable[[str], None]) -> None:
        self._callback = callback
        self._model: LoadedModel | None = None
        self._lock = threading.Lock()  # guards _running
        self._loading = threading.Lock()
        self._speaking = threading.Lock()
        self._running: dict[str, tuple[list[Reply], threading.Thread]] = {}
        self._aborted: set[str] = set()

    def reload(self, config: str) -> str:
        """Open a package, in place of the one that was open."""
        return self._answer(lambda: self._reload(_parse(config, "config")))

    def unload(self) -> str:
        """Abort what runs and release the package. Without one, nothing."""
        return self._answer(self._unload)

    def chat_completion(self, request: str, request_id: str) -> str:
        """Start a chat with the body of POST /v1/chat/completions; what comes of it goes to the callback."""
        return self._answer(lambda: self._start(_parse(request, "request"), request_id))

    def abort(self, request_id: str) -> str:
        """End a request; its last object follows. An id that is not running is ignored."""
        return self._answer(lambda: self._abort(request_id))

    def stats(self) -> str:
        """Gauges and counters: the fields of engine.core.Stats."""
        return self._answer(lambda: asdict(self._get_model().engine.get_stats()))

    def _answer(self, work: Callable[[], dict[str, Any] | None]) -> str:
        try:
            return _write(work() or {})
        except EngineError as error:
            return _write(_describe(error))
        except Exception:  # ours to mend: nothing may cross the boundary
            _log.exception("a call has failed")
            return _write(make_error("internal error; the log has the details", "server_error").model_dump())

    def _get_model(self) -> LoadedModel:
        if self._model is None:
            raise EngineStopped("no model is loaded", hint='call reload with {"model": <folder of a package>}')
        return self._model

    def _reload(self, config: dict[str, Any]) -> None:
        path = config.pop("model", None)
        if not isinstance(path, str):
            raise InvalidSetting("config has no 'model'", hint="give the folder of a package")
        if unknown := sorted(config.keys() - set(SETTINGS)):
            raise InvalidSetting(f"config has no '{unknown[0]}'", hint=f"it may have {', '.join(SETTINGS)}")
        settings = load_settings(ServerSettings, {name: str(value) for name, value in config.items()}, {})
        budget = Budget(settings.mode, settings.kv_tokens or None, settings.memory_fraction)
        guessing = get_guessing(settings)
        self._unload()
        with self._loading:
            self._model = load_model(
                Path(path),
                budget,
                name=settings.model_name,
                prefix_cache=bool(settings.prefix_cache),
                cache_file=Path(settings.cache_file) if settings.cache_file else None,
                queue_limit=settings.max_queue,
                **guessing,
            )

    def _unload(self) -> None:
        with self._loading:
            model, self._model = self._model, None
            if model is not None:
                model.engine.close()
        with self._lock:
            threads = [thread for _, thread in self._running.values()]
        for thread in threads:
            thread.join()

    def _start(self, request: dict[str, Any], request_id: str) -> None:
        job = make_job(self._get_model(), request.pop("stream", None), request)
        with self._lock:
            if request_id in self._running:
                raise InvalidRequest(f"request id {request_id} is in use", hint="give every request its own id")
            replies = job.start()
            thread = threading.Thread(target=self._run, args=(job, replies, request_id), daemon=True)
            self._running[request_id] = replies, thread
        thread.start()

    def _abort(self, request_id: str) -> None:
        with self._lock:
            replies, _ = self._running.get(request_id, ((), None))
            if replies:
                self._aborted.add(request_id)
        if (model := self._model) is not None:
            for reply in replies:
                model.engine.abort(reply.request_id)

    def _run(self, job: Job, replies: Sequence[Reply], request_id: str) -> None:
        """What each request does in a thread of its own: say what comes, and that it was the last."""
        last: dict[str, Any] = {}
        try:
            if job.body.stream:
                for chunk in job.stream(replies):
                    self._say(request_id, {"chunk": chunk.model_dump(exclude_unset=True)})
            else:
                last = {"answer": job.collect(replies).model_dump(exclude_unset=True)}
        except EngineError as error:
            last = _describe(error)
        except Exception:
            _log.exception("request %s has failed", request_id)
            last = make_error("internal error; the log has the details", "server_error").model_dump()
        finally:
            for reply in replies:
                reply.close()
        with self._lock:
            del self._running[request_id]
            if request_id in self._aborted:
                self._aborted.discard(request_id)
                last = {}
        try:
            self._say(request_id, {**last, "last": True})
        except Exception:
            _log.exception("the callback has failed at the end of request %s", request_id)

    def _say(self, request_id: str, text: dict[str, Any]) -> None:
        with self._speaking:
            self._callback(_write({"id": request_id, **text}))


def _parse(text: str, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the {what} is not JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"the {what} must be a JSON object", code="invalid_value")
    return value


def _describe(error: EngineError) -> dict[str, Any]:
    """OpenAI's body. What is wrong with settings or a package is said in full: whoever calls is on this machine."""
    if error.status == 500 and type(error) is not EngineError:
        return make_error(str(error).replace("\n  hint: ", "; "), error.kind, error.param, error.code).model_dump()
    return make_engine_error(error).model_dump()


def _write(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace").decode()


def serve_lines(stdin: TextIO, stdout: TextIO) -> None:
    """The calls of `stdin`, a line each, until it ends; see the top of this file."""
    writing = threading.Lock()

    def say(text: str) -> None:
        with writing:
            stdout.write(text + "\n")
            stdout.flush()

    engine = JsonEngine(say)
    calls: dict[str, Callable[[dict[str, Any]], str]] = {
        "reload": lambda call: engine.reload(_write(call.get("config") or {})),
        "chat_completion": lambda call: engine.chat_completion(_write(call.get("request") or {}), str(call.get("id"))),
        "abort": lambda call: engine.abort(str(call.get("id"))),
        "stats": lambda call: engine.stats(),
        "unload": lambda call: engine.unload(),
    }
    for line in stdin:
        try:
            call = _parse(line, "line")
            if call.get("call") not in calls:
                raise InvalidRequest(f"there is no call '{call.get('call')}'", hint=f"there are {', '.join(calls)}")
            result = calls[call["call"]](call)
        except InvalidRequest as error:
            result = _write(_describe(error))
        say(f'{{"result":{result}}}')
    engine.unload()


if __name__ == "__main__":
    serve_lines(sys.stdin, sys.stdout)
