"""Names that people type: refuse unknown ones and name the nearest."""

from __future__ import annotations

from collections.abc import Iterable

from mlcbuild.errors import UnknownNameError


def get_nearest(name: str, known: Iterable[str]) -> list[str]:
    """Up to three known names that look like `name`, best first."""
    import difflib

    lower = {item.lower(): item for item in known}
    found = difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.5)
    # A prefix is a good guess too: "llama" for "llama3.2-1b".
    found += [item for item in sorted(lower) if item.startswith(name.lower()) and item not in found]
    return [lower[item] for item in found[:3]]


def make_name_error(what: str, name: str, known: Iterable[str]) -> UnknownNameError:
    """The error for an unknown name: what it was to be, and the nearest known names (or all, when few)."""
    known = sorted(known)
    nearest = get_nearest(name, known)
    if nearest:
        hint = f"did you mean {' or '.join(nearest)}?"
    elif known:
        hint = f"known: {', '.join(known)}"
    else:
        hint = "there are none yet"
    return UnknownNameError(f"unknown {what} '{name}'", hint=hint)


def check_name(what: str, name: str, known: Iterable[str]) -> None:
    """Raise UnknownNameError unless `name` is one of `known`."""
    known = list(known)
    if name not in known:
        raise make_name_error(what, name, known)
