"""The unquantized model's predictions on the held-out text, computed once per model and compared with every package.

reference.npz holds `tokens` (int32), `lengths` (int32, the tokens of each window, which is a sequence of its own) and
`log_probs` [tokens, vocabulary]: float32 where that fits into 60 MB, else float16 and fewer tokens. reference.json says
what it is and the reference's own perplexity.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mlcbuild.errors import QualityError
from mlcbuild.quality.measure import compute_perplexity, log_softmax
from mlcbuild.quality.references import Report, get_reference

if TYPE_CHECKING:
    from mlcbuild.weights.source import WeightSource

SHORTEST = 3  # tokens of a window: one to see, one to measure at, one to predict
WINDOW = 256  # tokens that see each other; enough to need several KV pages, short enough to be quick
MOST_TOKENS = 2000
RANDOM_TOKENS = 64
MOST_BYTES = 60_000_000
ARRAYS, TEXT = "reference.npz", "reference.json"


@dataclass(frozen=True, slots=True)
class ReferenceData:
    """A loaded reference: `log_probs` float32 [tokens, vocab], normalised again after being stored."""

    tokens: NDArray[np.int32]
    lengths: tuple[int, ...]
    log_probs: NDArray[np.float32]
    random: bool
    perplexity: float

    @property
    def windows(self) -> list[NDArray[np.int32]]:
        """The tokens of each window."""
        return np.split(self.tokens, np.cumsum(self.lengths)[:-1])


def compute_reference(
    source: Path, family: str, config: Mapping[str, Any], text: Path | None, destination: Path, report: Report
) -> dict[str, Any]:
    """Write reference.npz and reference.json into `destination`; returns what reference.json holds.

    `source` is a checkpoint's folder, `config` the values of its config.json, `text` the held-out text. Without a text,
    and for random weights, which know no text, 64 seeded random tokens stand in. Raises QualityError for a family
    without a reference and for a text that is too short, WeightError for a checkpoint that cannot be read.
    """
    from mlcbuild.weights.source import open_source

    reference = get_reference(family)  # before anything that takes time
    random = is_random(source)
    vocabulary = config["vocab_size"]
    weights: WeightSource = open_source(source)
    windows = make_random_windows(vocabulary) if random or text is None else load_windows(source, text, vocabulary)
    logits = reference.compute_logits(weights, config, windows, report)
    log_probs = log_softmax(logits)
    summary = {
        "family": family,
        "text": text.name if text is not None and not random else None,
        "random": random,
        "tokens": len(log_probs),
        "windows": len(windows),
        "vocab_size": vocabulary,
        "perplexity": compute_perplexity(log_probs, windows),
    }
    dtype = np.float32 if log_probs.nbytes <= MOST_BYTES else np.float16
    destination.mkdir(parents=True, exist_ok=True)
    lengths = np.array([len(window) for window in windows], np.int32)
    np.savez(
        destination / ARRAYS, tokens=np.concatenate(windows), lengths=lengths, log_probs=log_probs.astype(dtype)
    )
    (destination / TEXT).write_text(json.dumps(summary, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return summary


def load_reference(folder: Path) -> ReferenceData:
    """Read what compute_reference wrote. Raises QualityError when it is missing or damaged."""
    try:
        summary = json.loads((folder / TEXT).read_text(encoding="utf-8"))
        with (folder / ARRAYS).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            tokens, lengths, stored = arrays["tokens"], arrays["lengths"], arrays["log_probs"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise QualityError(
            f"{folder}: the reference cannot be read: {error}",
            hint=f"make it again: delete the folder, then doit reference:{folder.name}",
        ) from error
    # Rounded to float16 they no longer add up to 1, which would bias the divergence.
    log_probs = log_softmax(stored.astype(np.float32))
    return ReferenceData(tokens, tuple(int(n) for n in lengths), log_probs, summary["random"], summary["perplexity"])


def is_random(source: Path) -> bool:
    """Whether the checkpoint in folder `source` is seeded random numbers."""
    path = source / "source.json"
    return path.is_file() and bool(json.loads(path.read_text(encoding="utf-8")).get("random", False))


def make_random_windows(vocabulary: int) -> list[NDArray[np.int32]]:
    """One window of seeded random tokens."""
    return [np.random.default_rng(0).integers(0, vocabulary, RANDOM_TOKENS, dtype=np.int32)]


def load_windows(source: Path, text: Path, vocabulary: int) -> list[NDArray[np.int32]]:
    """The text in windows of at most 256 tokens, each behind the tokens that the tokenizer puts before any text."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    prefix = tokenizer.encode("", add_special_tokens=True).ids
    ids = tokenizer.encode(text.read_text(encoding="utf-8"), add_special_tokens=False).ids
    ids = ids[: min(MOST_TOKENS, MOST_BYTES // (2 * vocabulary))]
    if len(ids) < SHORTEST:
        raise QualityError(f"{text}: the held-out text is too short: {len(ids)} tokens", hint="give at least a page")
    step = WINDOW - len(prefix)
    windows = [np.array(prefix + ids[i : i + step], np.int32) for i in range(0, len(ids), step)]
    return [window for window in windows if len(window) >= SHORTEST]
