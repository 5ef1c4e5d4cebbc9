"""lm-evaluation-harness, as anybody runs it, on tasks of this file: choices by log-probability, and replies."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_models import ROOT
from running import Running

CAPITALS = {"France": "Paris", "Italy": "Rome", "Norway": "Oslo"}
ASKED = r'doc_to_text: "<|im_start|>user\nWhat is the capital of {{country}}?<|im_end|>\n<|im_start|>assistant\n'
DATA = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
"""
CHOOSE = f"""{ASKED}The capital of {{{{country}}}} is"
task: choose
output_type: multiple_choice
doc_to_choice: "{{{{choices}}}}"
doc_to_target: number
metric_list: [{{metric: acc}}]
"""
SAY = f"""{ASKED}"
task: say
output_type: generate_until
doc_to_target: "The capital of {{{{country}}}} is {{{{choices[number]}}}}."
generation_kwargs: {{until: ["<|im_end|>"], max_gen_toks: 20, temperature: 0}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="MLCBUILD_EXTRAS=evals installs lm-eval")
def test_local_completions(tiny_server: Running, tmp_path: Path) -> None:
    rows = [{"country": c, "choices": list(CAPITALS.values()), "number": i} for i, c in enumerate(CAPITALS)]
    data = tmp_path / "capitals.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("choose", CHOOSE), ("say", SAY)):
        (tmp_path / f"{name}.yaml").write_text(text + DATA.format(path=data))
    tokenizer = ROOT / "recipes/models/tiny"
    where = f"model=tiny,base_url={tiny_server.url}/v1/completions,tokenizer={tokenizer},num_concurrent=2"
    command = ["-m", "lm_eval", "run", "--model", "local-completions", "--model_args", where, "--tasks", "choose,say"]
    command += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=tmp_path,
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(found.read_text())["results"]
    assert results["choose"]["acc,none"] == 1.0
    assert results["say"]["exact_match,none"] == 1.0
