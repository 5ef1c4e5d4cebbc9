"""The saved weights of `tiny` and its draft, seen by transformers: right shapes, right logits, right answers."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "recipes" / "models"
sys.path.insert(0, str(ROOT / "ci"))

import corpus  # noqa: E402
import train_tiny  # noqa: E402


def load(name: str) -> Any:
    return transformers.LlamaForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32).eval()


def answer(model: Any, tokenizer: Any, question: corpus.Question) -> str:
    """Greedy decoding by transformers itself, with its own chat template and KV cache."""
    ids = tokenizer.apply_chat_template(
        question.messages, tools=question.tools, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**ids, max_new_tokens=150)
    text = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=False)
    return str(text).removesuffix("<|im_end|>")


@pytest.mark.parametrize("name", ["tiny", "tiny-draft"])
def test_training_model_and_transformers_agree(name: str) -> None:
    ids = torch.arange(300).reshape(2, 150) * 13 % 2048
    with torch.inference_mode():
        ours, theirs = train_tiny.load_model(name)(ids), load(name)(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_tiny_answers_trained_questions_exactly() -> None:
    model = load("tiny")
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODELS / "tiny")
    questions = corpus.trained_questions()[::19]
    assert len(questions) >= 40
    wrong = [(q.messages[-1]["content"], got) for q in questions if (got := answer(model, tokenizer, q)) != q.answer]
    assert len(wrong) <= len(questions) // 20, wrong


@pytest.mark.parametrize("precision", ["float", "q4", "q4a8"])
def test_tiny_keeps_its_answers_when_quantized(precision: str) -> None:
    model, questions = train_tiny.load_model("tiny"), train_tiny.asked_questions(train_tiny.load_tokenizer())
    model.precision = precision
    wrong = train_tiny.wrong_answers(model, questions)
    assert len(wrong) <= 0.05 * len(questions), [q.text for q in wrong]


def test_weight_files_are_small_float16_and_do_not_repeat_the_tied_matrix() -> None:
    files = [MODELS / name / "model.safetensors" for name in ("tiny", "tiny-draft")]
    assert sum(file.stat().st_size for file in files) <= 12_000_000
    for file in files:
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        assert "lm_head.weight" not in header
        assert {entry["dtype"] for key, entry in header.items() if key != "__metadata__"} == {"F16"}
