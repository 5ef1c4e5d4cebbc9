"""Moves results between the content store and the remote cache without building anything: `doit cache pull|push`."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator

from mlcbuild.errors import StoreError
from mlcbuild.graph.action import Report, make_key
from mlcbuild.graph.explain import Forecast, explain_plan
from mlcbuild.graph.plan import Plan
from mlcbuild.graph.remote import Remote, get_remote, list_blobs
from mlcbuild.graph.settings import settings
from mlcbuild.graph.store import Record, Store
from mlcbuild.graph.workspace import get_workspace


def get_named_remote() -> Remote:
    """The remote of this process. StoreError when none is named, or its URL cannot be one."""
    remote = get_remote()
    if remote is None:
        hint = "leave out offline=1" if settings.offline else "remote=URL, or MLCBUILD_REMOTE"
        raise StoreError("there is no remote cache to exchange results with", hint=hint)
    return remote


def pull(plan: Plan, remote: Remote) -> Iterator[str]:
    """Bring what the selected variants need, and the remote has, into the store: a line for each task, then a summary.

    Nothing is placed in artifacts/: the next build does that, offline if need be.
    """
    store, count = get_workspace(plan.root).store, Counter[str]()
    for forecast in explain_plan(plan):
        if forecast.status != "remote hit":
            count["not there" if forecast.status == "run" else "here already"] += 1
            continue
        assert forecast.specification is not None
        record = remote.fetch(make_key(forecast.specification), store, get_report(forecast))
        count["pulled" if record is not None else "not there"] += 1
        yield describe("pull", forecast, record)
    yield describe_count(count, "pulled", "here already", "not there")


def push(plan: Plan, remote: Remote) -> Iterator[str]:
    """Give the remote what was built of the selected variants: a line for each task, then a summary.

    A remote that has a file already is not sent it again. StoreError when nothing may be written to the remote.
    """
    if remote.readonly:
        raise StoreError("nothing may be pushed: MLCBUILD_REMOTE_READONLY=1", hint="unset MLCBUILD_REMOTE_READONLY")
    store, count = get_workspace(plan.root).store, Counter[str]()
    for forecast in explain_plan(plan):
        record = find_record(forecast, store)
        if record is None:
            count["not built here"] += 1
            continue
        remote.push(record, store, get_report(forecast))
        if remote.has_failed:
            break
        count["pushed"] += 1
        yield describe("push", forecast, record)
    yield describe_count(count, "pushed", "not built here")


def get_report(forecast: Forecast) -> Report:
    """Where it is said how far a task's files are."""
    return functools.partial(settings.tell, forecast.action.task)


def find_record(forecast: Forecast, store: Store) -> Record | None:
    """The record of what a task has made, if the store still has all of it undamaged."""
    if forecast.status not in ("ok", "hit") or forecast.specification is None:
        return None
    record = store.load_record(make_key(forecast.specification))
    return record if record is not None and all(map(store.has_blob, list_blobs(record))) else None


def describe(verb: str, forecast: Forecast, record: Record | None) -> str:
    """The line of one task."""
    from mlcbuild.graph.summary import show_size

    size = show_size(sum(blob.size for blob in list_blobs(record))) if record is not None else "no longer complete"
    return f"{verb}  {forecast.action.step:<9} {forecast.action.name}  {size}"


def describe_count(count: Counter[str], *names: str) -> str:
    """The last line: how many tasks there were of each kind."""
    return ", ".join(f"{count[name]} {name}" for name in names)
