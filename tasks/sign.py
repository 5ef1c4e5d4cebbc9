"""sign: an ed25519 signature beside each selected package, with the key that MLCBUILD_SIGNING_KEY names.

    openssl genpkey -algorithm ed25519 -out key.pem
    MLCBUILD_SIGNING_KEY=key.pem ./doit sign model=tiny

With MLCBUILD_SIGNING_KEY set `./doit build` signs what it builds, too. signature.json is a DSSE envelope around the
in-toto statement of provenance.json; `./doit verify-package PATH key=pub.pem` checks it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlcbuild.graph.plan import call, get_plan
from mlcbuild.graph.settings import SIGNING_KEY

PRIVATE = "_sign"  # doit lists no tasks that begin with an underscore


def task_sign() -> Iterator[dict[str, Any]]:
    """sign packages with the key in MLCBUILD_SIGNING_KEY"""
    plan = get_plan()
    for build in plan.builds:
        package = str(plan.root / build.package)
        yield {
            "basename": PRIVATE,
            "name": build.id,
            "actions": [(call, [run_sign, package])],
            "task_dep": [f"verify:{build.id}" if build.runs_here else f"package:{build.id}"],
            "uptodate": [(has_signature, [package])],
            "verbosity": 2,
        }
    yield {"basename": "sign", "actions": None, "task_dep": [f"{PRIVATE}:{build.id}" for build in plan.selected]}


def run_sign(package: str) -> None:
    """Sign one package."""
    from mlcbuild.errors import PackageError
    from mlcbuild.package.signature import MAKE_KEY, load_signing_key, sign_package

    path, hint = os.environ.get(SIGNING_KEY), f"{SIGNING_KEY}=key.pem doit sign; without a key: {MAKE_KEY}"
    if not path:
        raise PackageError(f"{SIGNING_KEY} does not name a key to sign with", hint=hint)
    key = sign_package(Path(package), load_signing_key(Path(path)))
    print(f"sign  {Path(package).name}  with key {key[:12]}")


def has_signature(package: str) -> bool:
    """Whether the package has the present key's signature."""
    from mlcbuild.errors import PackageError
    from mlcbuild.package.signature import is_signed, load_signing_key

    try:
        return is_signed(Path(package), load_signing_key(Path(os.environ.get(SIGNING_KEY, ""))))
    except PackageError:
        return False  # it will be said when it is signed
