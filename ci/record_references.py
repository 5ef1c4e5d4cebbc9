"""Records transformers' logits of the small checkpoints in tests/models/reference_cases.py, for machines without torch.

    python ci/record_references.py      writes tests/models/recorded/<case>.npz (about 50 kB each)
"""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "models"))

from reference_cases import CASES, RECORDED, compute_with_transformers  # noqa: E402


def main() -> None:
    RECORDED.mkdir(exist_ok=True)
    tool = f"transformers {metadata.version('transformers')}, torch {metadata.version('torch').split('+')[0]}"
    for name, config in CASES.items():
        logits = compute_with_transformers(name)
        path = RECORDED / f"{name}.npz"
        np.savez_compressed(path, logits=logits, config=json.dumps(config, sort_keys=True), tool=tool)
        print(f"{path.name}: logits {logits.min():.2f} .. {logits.max():.2f}, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
