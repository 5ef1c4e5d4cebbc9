"""cache-server: a remote cache for a team, to be used as `./doit build remote=http://host:port`.

    ./doit cache-server port=9090 cache_size=200

It listens on this machine only, unless cache_host says otherwise; then MLCBUILD_REMOTE_TOKEN should be set, here and
for the builds, since whoever can write to a cache decides what others restore. bazel-remote and nginx (ci/nginx.conf)
can be in its place; they take MLCBUILD_REMOTE_USER and MLCBUILD_REMOTE_PASSWORD.
"""

from __future__ import annotations

import os
from typing import Any

from mlcbuild.graph.plan import call, get_plan

VARIABLES = {
    "port": "TCP port to listen on, 9090",
    "cache_host": "address to listen on, 127.0.0.1",
    "cache_folder": "where it keeps what it is given, artifacts/cache-server",
    "cache_size": "how many GB it may hold, 100",
}


def task_cache_server() -> dict[str, Any]:
    """hold built artifacts for other machines"""
    return {
        "basename": "cache-server",
        "actions": [(call, [run_server])],
        "uptodate": [False],
        "verbosity": 2,
        "io": {"capture": False},
    }


def run_server() -> None:
    """Serve until Ctrl-C."""
    from mlcbuild.errors import StoreError
    from mlcbuild.graph.cache_server import run_cache_server

    plan = get_plan()
    folder = (plan.root / plan.variables.get("cache_folder", "artifacts/cache-server")).absolute()
    host, token = plan.variables.get("cache_host", "127.0.0.1"), os.environ.get("MLCBUILD_REMOTE_TOKEN", "")
    try:
        port = int(plan.variables.get("port", 9090))
        most_bytes = int(float(plan.variables.get("cache_size", 100)) * 1e9)
        run_cache_server(folder, host, port, most_bytes, token)
    except (OSError, ValueError, OverflowError) as error:
        raise StoreError(
            f"the cache server cannot start: {error}",
            hint="./doit cache-server port=9090 cache_folder=/a/folder cache_size=100",
        ) from error
