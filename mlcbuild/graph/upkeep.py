"""Upkeep of the content store: what is in it, remove what nothing needs, re-hash what is there.

A record is needed while the outputs of its action lie in a checkout that uses the store (`checkouts/`), or while a
package that it went into is pinned (`pins/`). Everything here may run beside builds: they hold the store together while
they add or restore, and what removes something holds it alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mlcbuild.errors import PackageError
from mlcbuild.graph.action import PRIVATE
from mlcbuild.graph.digest import load_digest
from mlcbuild.graph.results import Result, ResultLog
from mlcbuild.graph.store import Blob, Record, Store

DAY = 86_400.0
# A blob this young may belong to a result whose record is not written yet, a record to one not placed yet (seconds).
GRACE = 3600.0


@dataclass(frozen=True, slots=True)
class Entry:
    """A record with its last use (seconds since the epoch), and whether something needs it."""

    record: Record
    used: float
    needed: bool

    @property
    def blobs(self) -> list[Blob]:
        """The files of all its outputs."""
        return [blob for output in self.record.outputs.values() for blob in output]


@dataclass
class Removal:
    """What gc removed, or would: records by step, and blobs with their bytes."""

    steps: Counter[str] = field(default_factory=Counter)
    blobs: int = 0
    size: int = 0


def register_checkout(store: Path, root: Path) -> None:
    """Note that the checkout `root` uses the store, so that gc asks it what it needs."""
    path = store / "checkouts" / hashlib.sha256(str(root).encode()).hexdigest()[:16]
    if not path.exists():
        with contextlib.suppress(OSError):  # the disk is full: the build itself will say so
            path.parent.mkdir(exist_ok=True)
            path.write_text(str(root), "utf-8")


def list_checkouts(store: Path) -> list[Path]:
    """The checkouts that use the store and still exist."""
    roots = [Path(file.read_text("utf-8")) for file in (store / "checkouts").glob("*")]
    return sorted({root for root in roots if (root / PRIVATE).is_dir()})


def load_results(store: Path) -> Iterator[tuple[ResultLog, str, Result]]:
    """What every task of every checkout has made last: the log that says so, the task and its result."""
    for root in list_checkouts(store):
        log = ResultLog(root)
        with contextlib.suppress(OSError):
            yield from ((log, task, result) for task, result in log.load_all())


def load_entries(store: Store) -> list[Entry]:
    """Every record of the store, least recently used first."""
    needed = {result.key for _, _, result in load_results(store.root)}
    for pin in (store.root / "pins").glob("*.json"):
        needed.update(json.loads(pin.read_text("utf-8")))
    entries = []
    for path in (store.root / "ac").glob("*.json"):
        with contextlib.suppress(FileNotFoundError):
            used, record = path.stat().st_mtime, store.load_record(path.stem)
            if record is not None:
                entries.append(Entry(record, used, record.key in needed))
    return sorted(entries, key=lambda entry: (entry.used, entry.record.key))


def pin_package(store: Store, folder: Path) -> int:
    """Keep what a package was made of, and the package itself, until it is unpinned: the number of records.

    PackageError when it is no package, or the store no longer has it.
    """
    try:
        text = (folder / "manifest.json").read_bytes()
        manifest = dict(json.loads(text))
        keys = [action["key"] for action in manifest["actions"].values()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PackageError(f"{folder} is not a package", hint="name a folder of artifacts/packages") from error
    digest = hashlib.sha256(text).hexdigest()
    made = [entry.record.key for entry in load_entries(store) if digest in {blob.sha256 for blob in entry.blobs}]
    if not made:
        raise PackageError(f"the store has no record of {folder}", hint="build it again, then pin it")
    path = store.root / "pins" / f"{folder.name}.json"
    path.parent.mkdir(exist_ok=True)
    keys = sorted({*keys, *made})
    path.write_text(json.dumps(keys, indent=1), "utf-8")
    return len(keys)


def unpin_package(store: Store, name: str) -> None:
    """Let gc have what only this package needs. PackageError when it is not pinned."""
    path = store.root / "pins" / f"{Path(name).name}.json"
    if not path.exists():
        pinned = ", ".join(sorted(file.stem for file in path.parent.glob("*.json")))
        raise PackageError(f"{Path(name).name} is not pinned", hint=f"pinned: {pinned or 'nothing'}")
    path.unlink()


def list_blob_files(store: Store) -> dict[str, os.stat_result]:
    """Every blob by digest."""
    found = {}
    for folder in (store.root / "cas").iterdir():
        for entry in os.scandir(folder):
            with contextlib.suppress(FileNotFoundError):
                found[entry.name] = entry.stat()
    return found


def collect_garbage(store: Store, age: float | None, size: int | None, *, dryrun: bool) -> Removal:
    """Remove records that nothing needs and that were last used more than `age` seconds ago; then the least recently
    used ones until the blobs take no more than `size` bytes; then the blobs that no record speaks of."""
    with store.hold(alone=True):
        entries, files, now = load_entries(store), list_blob_files(store), time.time()
        free = [entry for entry in entries if not entry.needed and now - entry.used > GRACE]
        doomed = [entry for entry in free if age is not None and now - entry.used > age]
        old = {entry.record.key for entry in doomed}
        kept = [entry for entry in entries if entry.record.key not in old]
        count = Counter(digest for entry in kept for digest in {blob.sha256 for blob in entry.blobs})
        total = sum(files[digest].st_size for digest in count if digest in files)
        for entry in free[len(doomed) :]:  # the least recently used come first
            if size is None or total <= size:
                break
            doomed.append(entry)
            for digest in {blob.sha256 for blob in entry.blobs}:
                count[digest] -= 1
                total -= files[digest].st_size if not count[digest] and digest in files else 0
        removal = Removal(Counter(str(entry.record.specification.get("step")) for entry in doomed))
        if not dryrun:
            for entry in doomed:  # records first: one without its blobs would be a miss, found late
                store.remove_record(entry.record.key)
        freed = {blob.sha256 for entry in doomed for blob in entry.blobs}
        for digest, stat in files.items():
            # ctime: when it was linked or renamed into the store; mtime is that of the file it came from
            if count[digest] <= 0 and (digest in freed or now - stat.st_ctime > GRACE):
                removal.blobs, removal.size = removal.blobs + 1, removal.size + stat.st_size
                if not dryrun:
                    store.get_blob_path(digest).unlink(missing_ok=True)
    return removal


def check_blobs(store: Store) -> tuple[int, int, list[str]]:
    """Hash every blob anew: their number, their bytes, and a text for each that was damaged.

    A damaged one moves to quarantine, and the outputs that share its bytes are made anew by the next build.
    """
    files, damaged = list_blob_files(store), []
    for digest, stat in sorted(files.items()):
        path = store.get_blob_path(digest)
        with contextlib.suppress(FileNotFoundError):
            if load_digest(path) != digest:
                damaged.append((digest, stat))
    texts = []
    for digest, stat in damaged:
        owners = [entry for entry in load_entries(store) if digest in {blob.sha256 for blob in entry.blobs}]
        with store.hold(alone=True):
            store.quarantine(store.get_blob_path(digest))
        what = {f"{entry.record.specification.get('step')} {find_name(entry, digest)}" for entry in owners}
        texts.append(f"{digest[:12]} is damaged ({', '.join(sorted(what)) or 'of no record'}): moved to quarantine")
        texts += [f"  shared by {path}: the next build makes it anew" for path in forget_shared(store, stat)]
    return len(files), sum(stat.st_size for stat in files.values()), texts


def find_name(entry: Entry, digest: str) -> str:
    """What a record calls one of its blobs."""
    return next(
        blob.path or name for name, output in entry.record.outputs.items() for blob in output if blob.sha256 == digest
    )


def forget_shared(store: Store, stat: os.stat_result) -> list[str]:
    """Drop the results of actions whose outputs are hard links to a damaged blob: the paths of these outputs."""
    found = []
    for log, task, result in load_results(store.root):
        shared = [path for path, known in result.outputs.items() if known[:2] == [stat.st_dev, stat.st_ino]]
        if shared:
            log.forget(task)
            found += shared
    return sorted(found)


def make_statistics(store: Store) -> list[str]:
    """Lines for people: records and bytes by step, what is needed, what is in quarantine."""
    from mlcbuild.graph.summary import show_size

    entries, files = load_entries(store), list_blob_files(store)
    lines = [f"{'step':<10} {'records':>7} {'size':>9} {'seconds':>9}"]
    for step in sorted({str(entry.record.specification["step"]) for entry in entries}):
        own = [entry for entry in entries if entry.record.specification["step"] == step]
        size = sum({blob.sha256: blob.size for entry in own for blob in entry.blobs}.values())
        seconds = sum(entry.record.seconds for entry in own)
        lines.append(f"{step:<10} {len(own):>7} {show_size(size):>9} {seconds:>9.1f}")
    needed = {blob.sha256 for entry in entries if entry.needed for blob in entry.blobs}
    sizes = [
        sum(stat.st_size for digest, stat in files.items() if (digest in needed) is want) for want in (True, False)
    ]
    lines.append(f"needed by a checkout or a pin: {show_size(sizes[0])}; by nothing: {show_size(sizes[1])}")
    damaged = len(list((store.root / "quarantine").glob("*")))
    pins = ", ".join(sorted(path.stem for path in (store.root / "pins").glob("*.json")))
    return lines + [f"pinned: {pins}"] * bool(pins) + [f"in quarantine: {damaged} files"] * bool(damaged)
