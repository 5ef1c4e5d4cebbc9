"""The Hugging Face hub: fetch the needed files of a repository at a commit, and say clearly why when that fails.

huggingface_hub does the transfer into its own cache: it resumes, knows the token of `hf auth login`, HF_ENDPOINT,
HF_HUB_OFFLINE and HF_HOME. Files are linked from there, or copied where links are impossible, and compared with the
hashes that the hub states.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlcbuild.errors import DownloadError

if TYPE_CHECKING:
    from mlcbuild.recipes.schema import Source
    from mlcbuild.weights.convert import Report

OFFLINE_HINT = "build without offline=1 and HF_HUB_OFFLINE, or with source=random"


def lock_revision(source: Source, lock: Path | None) -> Source:
    """The source at the commit that its revision means: from the lock file, else asked of the hub and recorded there.

    Raises DownloadError when the hub cannot be asked, RecipeError for a damaged lock file.
    """
    from mlcbuild.recipes.reader import load_document

    assert source.repo is not None
    if lock is not None and lock.exists():
        locked = load_document(lock).data
        if locked.get("repo") == source.repo:
            return type(source).model_validate({"repo": source.repo, "revision": locked.get("revision")})
    commit = resolve_revision(source.repo, str(source.revision))
    if lock is not None:
        scratch = lock.with_name(f"{lock.name}.{os.getpid()}")
        scratch.write_text(
            f"# Resolved at the first download; delete this file to follow {source.revision} again.\n"
            f"repo: {source.repo}\n"
            f'revision: "{commit}"\n',
            encoding="utf-8",
        )
        os.replace(scratch, lock)
    return type(source).model_validate({"repo": source.repo, "revision": commit})


def resolve_revision(repo: str, revision: str) -> str:
    """The commit that a branch points to now."""
    from huggingface_hub import HfApi

    try:
        commit = HfApi().model_info(repo, revision=revision).sha
    except Exception as error:
        raise explain(error, repo, revision) or error from error
    assert commit is not None
    return commit


def fetch_repository(source: Source, destination: Path, report: Report) -> None:
    """Put the needed files of `source.repo` at the commit `source.revision` into `destination`."""
    from huggingface_hub import snapshot_download

    from mlcbuild.weights.download import PATTERNS, is_needed

    repo, revision = str(source.repo), str(source.revision)
    report(f"{repo} at {revision[:12]}", None)
    try:
        snapshot = Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=list(PATTERNS), tqdm_class=make_progress(repo, report)
            )
        )
    except Exception as error:
        raise explain(error, repo, revision) or error from error
    expected = list_hashes(repo, revision)
    for path in sorted(snapshot.iterdir()):
        if is_needed(path.name):
            check_hash(path, expected.get(path.name), repo)
            link_or_copy(path.resolve(), destination / path.name)


def make_progress(repo: str, report: Report) -> type[Any]:
    """A progress bar for huggingface_hub that draws nothing and tells `report` the share of bytes."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    class Progress(tqdm):
        """Counts bytes; bars that count files stay silent."""

        def __init__(self, *args: Any, **options: Any) -> None:
            self.sink = open(os.devnull, "w")  # noqa: SIM115  closed with the bar
            super().__init__(*args, **{**options, "file": self.sink, "disable": False})

        def update(self, n: float | None = 1) -> bool | None:
            moved = super().update(n)
            if self.unit == "B" and self.total:
                report(repo, min(1.0, self.n / self.total), int(self.total))
            return bool(moved)

        def close(self) -> None:
            super().close()
            self.sink.close()

    return Progress


def list_hashes(repo: str, revision: str) -> dict[str, tuple[str, str]]:
    """Name -> ("sha256" or "sha1", hex) of the files at a commit, as the hub states them; {} when it is out of reach.

    Small files have the SHA-1 of a git blob, large ones their SHA-256.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    try:
        items = list(HfApi().list_repo_tree(repo, revision=revision))
    except Exception as error:
        if explain(error, repo, revision) is None:
            raise
        return {}  # the files came from the cache, and were compared when they came into it
    return {
        item.path: ("sha256", item.lfs.sha256) if item.lfs else ("sha1", item.blob_id)
        for item in items
        if isinstance(item, RepoFile)
    }


def check_hash(path: Path, expected: tuple[str, str] | None, repo: str) -> None:
    """Raise DownloadError, and drop the cached file, when it is not what the hub states."""
    from mlcbuild.weights.download import read_chunks

    if expected is None:
        return
    kind, value = expected
    digest = hashlib.new(kind, usedforsecurity=False)
    if kind == "sha1":
        digest.update(f"blob {path.stat().st_size}\0".encode())
    for chunk in read_chunks(path):
        digest.update(chunk)
    if digest.hexdigest() != value:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise DownloadError(
            f"{path.name} of {repo} is not what the hub says: {kind} {digest.hexdigest()}, expected {value}",
            hint="the damaged copy was removed from the cache; run the command again",
        )


def link_or_copy(path: Path, destination: Path) -> None:
    """A second name for a file; a copy where the file system cannot. Raises DownloadError when the disk is full."""
    try:
        destination.unlink(missing_ok=True)
        os.link(path, destination)
    except OSError:
        try:
            shutil.copyfile(path, destination)
        except OSError as error:
            raise DownloadError(f"{path.name} cannot be copied to {destination}: {error.strerror}") from error


def explain(error: Exception, repo: str, revision: str) -> DownloadError | None:
    """What a failure of huggingface_hub means for a person; None for one that is no failure of the transfer."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        hint = f"accept its terms at {constants.ENDPOINT}/{repo}, then: hf auth login"
        return DownloadError(f"{repo} is gated: its publisher wants you to accept terms first", hint=hint)
    if isinstance(error, errors.RevisionNotFoundError):
        return DownloadError(f"{repo} has no revision {revision}", hint="mend source.revision in the model recipe")
    if isinstance(error, errors.RepositoryNotFoundError):
        hint = "mend source.repo in the model recipe; if it is private: hf auth login"
        return DownloadError(f"there is no repository {repo}, or it is private", hint=hint)
    if isinstance(error, errors.HFValidationError):
        return DownloadError(f"'{repo}' is not a repository name", hint="write source.repo as owner/name")
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled) and constants.HF_HUB_OFFLINE:
        return DownloadError(f"{repo} at {revision} is not in the cache, and HF_HUB_OFFLINE is set", hint=OFFLINE_HINT)
    if isinstance(error, errors.HfHubHTTPError) and error.response is not None:
        status = error.response.status_code
        return DownloadError(f"{constants.ENDPOINT} answered {status} for {repo}", hint="try again later")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = constants.HF_HUB_CACHE
        return DownloadError(f"no space left for {repo} in {where}", hint="free some space, or set HF_HOME")
    if is_network(error):
        hint = "check the network; HF_ENDPOINT names a mirror; source=random builds without a download"
        return DownloadError(f"{constants.ENDPOINT} cannot be reached for {repo}", hint=hint)
    return None


def is_network(error: Exception) -> bool:
    """Whether an error comes from the connection: refused, reset, timed out, no such host."""
    from huggingface_hub import errors

    kinds = (ConnectionError, TimeoutError, errors.LocalEntryNotFoundError, errors.FileMetadataError)
    return isinstance(error, kinds) or type(error).__module__.partition(".")[0].startswith("httpx")
