"""Trains the embedded model `tiny` and its draft model on the CPU, from the corpus of `ci/corpus.py`.

    python ci/train_tiny.py tokenizer              train the tokenizer, write both model folders with random weights
    python ci/train_tiny.py train tiny             train, with checkpoints; `--resume` goes on from the last one
    python ci/train_tiny.py train tiny-draft       the same for the draft, which learns from the finished tiny
    python ci/train_tiny.py check tiny             score the saved weights (`--check` is short for this)

The last part of training is quantisation-aware: the forward pass sees weights as MLC's 4-bit groups store them, and in
some steps also int8 activations, while gradients pass straight through the rounding. So the saved float weights and
their 4-bit form answer alike, which makes the model a sharp test of a build: a wrong answer is a bug, not noise.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import corpus
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

MODELS_DIR = Path(__file__).resolve().parent.parent / "recipes" / "models"
VOCAB_SIZE = 2048
LONG_ROW = 1000
END, IM_START, IM_END = 0, 1, 2
CONTROL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Not "special" in the sense of transformers, as in Qwen 2.5: a decoder that skips special tokens must still show them.
MARKUP_TOKENS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
# The pattern of Qwen 2.5: words with their leading space, single digits (so sums stay learnable), punctuation, space.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


# --- the model -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """The shape of a Llama model, in the names of a Hugging Face config.json."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = 32
    vocab_size: int = VOCAB_SIZE
    max_position_embeddings: int = 1024
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5


# Every input dimension is a multiple of 64 and head_dim one of 16: kernels need no tails.
CONFIGS = {
    "tiny": Config(256, 768, 6, 8, 4),
    "tiny-draft": Config(128, 256, 2, 4, 2),
}

Precision = str  # "float", "q4" or "q4a8"


def quantized(weight: Tensor) -> Tensor:
    """MLC's symmetric 4-bit groups of 32 along the input dimension, as float: what a 4-bit kernel computes with."""
    groups = weight.detach().float().reshape(-1, 32)
    scale = (groups.abs().amax(1, keepdim=True) / 7).to(torch.float16).float().clamp_min(1e-7)
    steps = (groups / scale + 7).round_().clamp_(0, 14).sub_(7)
    return (steps * scale).reshape(weight.shape)


def int8_rounded(x: Tensor) -> Tensor:
    """Activations rounded to int8 in groups of 32, as the integer CPU kernels do."""
    groups = x.detach().float().reshape(*x.shape[:-1], -1, 32)
    scale = groups.abs().amax(-1, keepdim=True).div_(127).clamp_min_(1e-9)
    return (groups / scale).round_().mul_(scale).reshape(x.shape)


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """The value of `rounded` with the gradient of `x`."""
    return x + (rounded.to(x.dtype) - x.detach())


class Llama(nn.Module):
    """A compact Llama whose parameter names are those of Hugging Face, so that saving needs no mapping."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.precision: Precision = "float"
        c, q, kv = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, c)}
        for i in range(config.num_hidden_layers):
            layer = f"model.layers.{i}."
            shapes[layer + "input_layernorm.weight"] = (c,)
            shapes[layer + "self_attn.q_proj.weight"] = (q * config.head_dim, c)
            shapes[layer + "self_attn.k_proj.weight"] = (kv * config.head_dim, c)
            shapes[layer + "self_attn.v_proj.weight"] = (kv * config.head_dim, c)
            shapes[layer + "self_attn.o_proj.weight"] = (c, q * config.head_dim)
            shapes[layer + "post_attention_layernorm.weight"] = (c,)
            shapes[layer + "mlp.gate_proj.weight"] = (config.intermediate_size, c)
            shapes[layer + "mlp.up_proj.weight"] = (config.intermediate_size, c)
            shapes[layer + "mlp.down_proj.weight"] = (c, config.intermediate_size)
        shapes["model.norm.weight"] = (c,)
        # "." is not allowed in a parameter name of torch, hence the two spellings.
        self.names = {name: name.replace(".", "/") for name in shapes}
        for name, shape in shapes.items():
            self.register_parameter(self.names[name], nn.Parameter(self._initial(name, shape)))
        angles = torch.outer(
            torch.arange(config.max_position_embeddings).float(),
            config.rope_theta ** (-torch.arange(0, config.head_dim, 2).float() / config.head_dim),
        )
        angles = torch.cat([angles, angles], dim=-1)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def _initial(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:
            return torch.ones(shape)
        # Matrices that write into the residual stream start smaller, so that its size does not grow with depth.
        depth = 2 * self.config.num_hidden_layers if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
        return torch.randn(shape) * 0.03 / math.sqrt(depth)

    def weights(self) -> dict[str, Tensor]:
        """The parameters by their Hugging Face names; matrices as the current precision sees them."""
        found = {name: self.get_parameter(spelled) for name, spelled in self.names.items()}
        if self.precision == "float":
            return found
        return {n: straight_through(w, quantized(w)) if w.ndim == 2 else w for n, w in found.items()}

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits for token ids [batch, length]; `mask` is true where a query may look, the default is causal."""
        w = self.weights()
        x = F.embedding(ids, w["model.embed_tokens.weight"])
        for i in range(self.config.num_hidden_layers):
            layer = f"model.layers.{i}."
            x = x + self._attention(w, layer + "self_attn.", self._norm(x, w[layer + "input_layernorm.weight"]), mask)
            x = x + self._mlp(w, layer + "mlp.", self._norm(x, w[layer + "post_attention_layernorm.weight"]))
        return self._linear(self._norm(x, w["model.norm.weight"]), w["model.embed_tokens.weight"])

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self.config.rms_norm_eps)

    def _round(self, x: Tensor) -> Tensor:
        """The input of a matrix product, int8-rounded if the precision says so: once for all that share it."""
        return straight_through(x, int8_rounded(x)) if self.precision == "q4a8" else x

    def _linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(self._round(x), weight)

    def _mlp(self, w: dict[str, Tensor], at: str, x: Tensor) -> Tensor:
        x = self._round(x)
        gate, up = F.linear(x, w[at + "gate_proj.weight"]), F.linear(x, w[at + "up_proj.weight"])
        return self._linear(F.silu(gate) * up, w[at + "down_proj.weight"])

    def _attention(self, w: dict[str, Tensor], at: str, x: Tensor, mask: Tensor | None) -> Tensor:
        batch, length, _ = x.shape
        x = self._round(x)
        q, k, v = (
            F.linear(x, w[f"{at}{name}_proj.weight"]).view(batch, length, -1, self.config.head_dim).transpose(1, 2)
            for name in "qkv"
        )
        q, k = self._rotate(q), self._rotate(k)
        groups = self.config.num_attention_heads // self.config.num_key_value_heads
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self._linear(out.transpose(1, 2).reshape(batch, length, -1), w[at + "o_proj.weight"])

    def _rotate(self, x: Tensor) -> Tensor:
        length = x.shape[2]
        cos, sin = self.get_buffer("cos")[:length].to(x.dtype), self.get_buffer("sin")[:length].to(x.dtype)
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin


# --- files -----------------------------------------------------------------------------------------------------------


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Others may be reading the file: they see the old one or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".part")
    write(scratch)
    scratch.chmod(0o644)  # safetensors writes files that only their owner may read
    os.replace(scratch, path)


def write_json(path: Path, value: Any) -> None:
    """Indented JSON with a final newline."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, lambda scratch: scratch.write_text(text, encoding="utf-8"))


def save_model(model: Llama, folder: Path) -> None:
    """Write config.json, generation_config.json and the weights in float16; the tied output matrix is not repeated."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **asdict(model.config),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": IM_END,
        "pad_token_id": END,
        "torch_dtype": "float16",
        "use_cache": True,
    }
    write_json(folder / "config.json", config)
    generation = {"do_sample": False, "eos_token_id": [IM_END, END], "pad_token_id": END}
    write_json(folder / "generation_config.json", generation)
    tensors = {name: model.get_parameter(spelled).detach().half().contiguous() for name, spelled in model.names.items()}
    write_atomically(folder / "model.safetensors", lambda part: save_file(tensors, part, metadata={"format": "pt"}))


def load_model(name: str) -> Llama:
    """The saved weights of a model of this file, as float32."""
    model = Llama(CONFIGS[name])
    tensors = load_file(MODELS_DIR / name / "model.safetensors")
    assert set(tensors) == set(model.names), "the saved tensors are not those of the model"
    model.load_state_dict({model.names[key]: value.float() for key, value in tensors.items()})
    return model.eval()


def train_tokenizer() -> Tokenizer:
    """A byte-level BPE of 2048 tokens: 3 control and 4 markup tokens, 256 bytes, the rest merges of the corpus."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=CONTROL_TOKENS + [AddedToken(token, special=True) for token in MARKUP_TOKENS],
        show_progress=False,
    )
    tokenizer.train_from_iterator((corpus.render(c.messages, c.tools) for c in corpus.conversations()), trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE, tokenizer.get_vocab_size()
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the three tokenizer files."""
    state = json.loads(tokenizer.to_str())
    for token in state["added_tokens"]:
        token["special"] = token["content"] in CONTROL_TOKENS
    write_json(folder / "tokenizer.json", state)
    added = {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in state["added_tokens"]}
    write_json(
        folder / "tokenizer_config.json",
        {
            "added_tokens_decoder": added,
            "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
            "bos_token": None,
            "chat_template": corpus.CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "model_max_length": 1024,
            "pad_token": "<|endoftext|>",
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": None,
        },
    )
    special = {
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    write_json(folder / "special_tokens_map.json", special)


def load_tokenizer() -> Tokenizer:
    """The tokenizer that both models share."""
    return Tokenizer.from_file(str(MODELS_DIR / "tiny" / "tokenizer.json"))


# --- batches ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One conversation as tokens, each with its weight in the loss."""

    kind: str
    ids: list[int]
    weights: list[float]


def encode(tokenizer: Tokenizer, chat: corpus.Conversation) -> Sample:
    """Tokens of a conversation. What the assistant says counts in full, sums and counting more, the rest little.

    The rest counts at all because the perplexity of the held-out text is that of all its tokens.
    """
    ids = tokenizer.encode(corpus.render(chat.messages, chat.tools), add_special_tokens=False).ids
    header = tokenizer.encode("assistant\n", add_special_tokens=False).ids
    weights = [0.15] * len(ids)
    for start, token in enumerate(ids):
        if token == IM_START and ids[start + 1 : start + 1 + len(header)] == header:
            first = start + 1 + len(header)
            last = ids.index(IM_END, first)
            weights[first : last + 1] = [1.0] * (last + 1 - first)
    if chat.kind == "arithmetic":
        equals = tokenizer.token_to_id("Ġ=")
        result = max(i for i, token in enumerate(ids) if token == equals) + 1
        weights[result:] = [3 * weight for weight in weights[result:]]
    if chat.kind == "copy":
        weights = [4 * weight for weight in weights]
    return Sample(chat.kind, ids, weights)


def epochs(tokenizer: Tokenizer, seed: int) -> Iterator[list[Sample]]:
    """Endless epochs, each in its own order."""
    for number in itertools.count(1000 * seed):
        samples = [encode(tokenizer, chat) for chat in corpus.epoch(number)]
        random.Random(number).shuffle(samples)
        yield samples


@dataclass(frozen=True)
class Batch:
    """Rows of packed conversations: inputs, targets, loss weights and who may look at whom."""

    inputs: Tensor
    targets: Tensor
    weights: Tensor
    mask: Tensor


Row = tuple[list[int], list[float], list[int]]


def pack_rows(source: Iterator[list[Sample]], length: int, apart: float, rng: random.Random) -> Iterator[Row]:
    """Endless rows of `length` + 1 tokens: ids, loss weights, document numbers.

    `apart` is the chance that a conversation does not see the one before it in the row. Often it does see it, as in a
    chat with several subjects and as in the held-out text.
    """
    for order in source:
        while order:
            ids: list[int] = []
            weights: list[float] = []
            documents: list[int] = []
            document = 0
            while (room := length + 1 - len(ids)) > 0:
                nearest = range(-1, -min(len(order), 40) - 1, -1)
                fitting = next((i for i in nearest if len(order[i].ids) <= room), None)
                if fitting is None:
                    break
                sample = order.pop(fitting)
                # An answer that depends on there being no tools must not see any of an earlier conversation.
                chance = {"no tools": 1.0, "tools": max(apart, 0.5)}.get(sample.kind, apart)
                document += rng.random() < chance
                ids += sample.ids
                weights += sample.weights
                documents += [document] * len(sample.ids)
            yield ids + [END] * room, weights + [0.0] * room, documents + [-1] * room


def make_batch(rows: list[Row]) -> Batch:
    """Rows as tensors, shifted by one for the targets."""
    ids, weights, documents = (torch.tensor(column) for column in zip(*rows, strict=True))
    seen = documents[:, :-1]
    causal = torch.ones(seen.shape[1], seen.shape[1], dtype=torch.bool).tril()
    mask = causal & (seen[:, :, None] == seen[:, None, :])
    # The first token of a document cannot be foretold from the document before it.
    return Batch(ids[:, :-1], ids[:, 1:], weights[:, 1:] * (documents[:, 1:] == seen), mask[:, None])


def batches(tokenizer: Tokenizer, rows: int, length: int, seed: int) -> Iterator[Batch]:
    """Endless batches, the same for the same seed; every fourth has few but long rows.

    Short rows are quick. Long ones hold the conversations with tools, and teach answering after a long history.
    """
    no_tools = ([s for s in samples if s.kind != "tools"] for samples in epochs(tokenizer, 2 * seed))
    mixed = ([s for i, s in enumerate(e) if s.kind == "tools" or i % 3 == 0] for e in epochs(tokenizer, 2 * seed + 1))
    short = pack_rows(no_tools, length, 0.5, random.Random(seed))
    long = pack_rows(mixed, LONG_ROW, 0.04, random.Random(seed + 1))
    for step in itertools.count():
        if step % 4 == 3:
            yield make_batch([next(long) for _ in range(max(1, rows * length // LONG_ROW))])
        else:
            yield make_batch([next(short) for _ in range(rows)])


# --- training --------------------------------------------------------------------------------------------------------


@dataclass
class Plan:
    """What a training run is made of; every number is an option of `train`."""

    steps: int
    rows: int
    length: int
    rate: float
    seed: int
    float_part: float


def learning_rate(plan: Plan, step: int) -> float:
    """Warm-up over 100 steps, then a cosine down to one fiftieth."""
    progress = step / plan.steps
    return plan.rate * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def precision_at(plan: Plan, step: int) -> Precision:
    """Float first; later a mixture, so that one set of weights answers alike in every form."""
    if step < plan.float_part * plan.steps:
        return "float"
    return random.Random(step).choices(["float", "q4", "q4a8"], [0.2, 0.45, 0.35])[0]


def loss_of(model: Llama, batch: Batch, teacher: Llama | None) -> Tensor:
    """Weighted cross entropy; with a teacher also its distribution, which tells a draft what tiny will say."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(batch.inputs, batch.mask)
    logits = logits.float().flatten(0, 1)
    weights = batch.weights.flatten() / batch.weights.sum()
    loss = (F.cross_entropy(logits, batch.targets.flatten(), reduction="none") * weights).sum()
    if teacher is None:
        return loss
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted = teacher(batch.inputs, batch.mask).float().flatten(0, 1).softmax(-1)
    distance = -(wanted * logits.log_softmax(-1)).sum(-1)
    return 0.3 * loss + 0.7 * (distance * weights).sum()


def make_optimizer(model: Llama, plan: Plan) -> torch.optim.AdamW:
    """AdamW; matrices decay a little, norms do not."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    norms = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=plan.rate, betas=(0.9, 0.97), eps=1e-8, fused=True)


def train(name: str, plan: Plan, checkpoint: Path, resume: bool, stop_after: float) -> None:
    """Train one model and write it; a checkpoint every 100 steps lets a broken run go on, also with another plan."""
    torch.manual_seed(plan.seed)
    tokenizer, model = load_tokenizer(), Llama(CONFIGS[name])
    optimizer = make_optimizer(model, plan)
    teacher = load_model("tiny") if name == "tiny-draft" else None
    first, spent = restore(checkpoint, model, optimizer) if resume and checkpoint.exists() else (0, 0.0)
    # A resumed run draws new conversations: making the old ones again to skip them would take minutes.
    source = batches(tokenizer, plan.rows, plan.length, plan.seed + first)
    size = sum(p.numel() for p in model.parameters())
    print(f"{name}: {size:,} parameters, {plan}, from step {first}", flush=True)
    started, smooth = time.monotonic() - spent, None
    for step in range(first, plan.steps):
        loss = train_step(model, optimizer, next(source), teacher, learning_rate(plan, step), precision_at(plan, step))
        smooth = loss if smooth is None else 0.95 * smooth + 0.05 * loss
        spent, done = time.monotonic() - started, step + 1
        if done % 25 == 0 or done == plan.steps:
            print(progress(plan, done, spent, model.precision, smooth), flush=True)
        if done % 100 == 0 or done == plan.steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done, "seconds": spent}
            write_atomically(checkpoint, functools.partial(torch.save, state))
        if stop_after and spent > stop_after * 60:
            print("time is up; --resume goes on", flush=True)
            break
    save_model(model, MODELS_DIR / name)


def restore(checkpoint: Path, model: Llama, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """Put a checkpoint back; returns the steps done and the seconds that they took."""
    state = torch.load(checkpoint, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"]), float(state["seconds"])


def progress(plan: Plan, done: int, spent: float, precision: Precision, loss: float) -> str:
    """One line of the log."""
    speed, left = done * plan.rows * plan.length / spent, spent / done * (plan.steps - done)
    rate = learning_rate(plan, done - 1)
    return (
        f"step {done}/{plan.steps} {precision:5s} loss {loss:.4f} rate {rate:.1e} "
        f"{speed:,.0f} tok/s {spent:,.0f} s, ETA {left:,.0f} s"
    )


def train_step(
    model: Llama,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    teacher: Llama | None,
    rate: float,
    precision: Precision,
) -> float:
    """One step of gradient descent; returns the loss."""
    model.precision = precision
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = loss_of(model, batch, teacher)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.item())


# --- scores ----------------------------------------------------------------------------------------------------------

PRECISIONS = {"float": "float32", "q4": "4-bit weights", "q4a8": "4-bit weights, int8 activations"}


@dataclass(frozen=True)
class Asked:
    """A trained question as tokens."""

    kind: str
    text: str
    prompt: list[int]
    answer: list[int]


def asked_questions(tokenizer: Tokenizer) -> list[Asked]:
    """The trained questions; an answer ends with `<|im_end|>`."""
    found = []
    for q in corpus.trained_questions():
        prompt = corpus.render(q.messages, q.tools, add_generation_prompt=True)
        tokens = [tokenizer.encode(text, add_special_tokens=False).ids for text in (prompt, q.answer)]
        found.append(Asked(q.kind, q.messages[-1]["content"], tokens[0], [*tokens[1], IM_END]))
    return found


def batched(questions: list[Asked], size: int = 32) -> Iterator[tuple[list[Asked], Tensor]]:
    """Questions of like length together, as right-padded rows; causal attention never sees the padding."""
    by_length = sorted(questions, key=lambda q: len(q.prompt) + len(q.answer))
    for i in range(0, len(by_length), size):
        group = by_length[i : i + size]
        rows = [torch.tensor(q.prompt + q.answer) for q in group]
        yield group, nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=END)


@torch.inference_mode()
def wrong_answers(model: Llama, questions: list[Asked]) -> list[Asked]:
    """Questions not answered word for word.

    A greedy decoder writes exactly the answer if and only if, after each right beginning, the best next token is the
    right one; so one pass over prompt and answer decides, and no decoding loop is needed.
    """
    wrong = []
    for group, rows in batched(questions):
        best = model(rows).argmax(-1)
        for row, q in enumerate(group):
            start = len(q.prompt) - 1
            if best[row, start : start + len(q.answer)].tolist() != q.answer:
                wrong.append(q)
    return wrong


def held_out_windows(tokenizer: Tokenizer, length: int = 512) -> Iterable[Tensor]:
    """The held-out text as rows of at most `length` + 1 tokens, each starting with the last token of the one before."""
    text = (MODELS_DIR / "tiny" / "heldout.txt").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids)
    return [ids[i : i + length + 1] for i in range(0, len(ids) - 1, length)]


@torch.inference_mode()
def perplexity(model: Llama, tokenizer: Tokenizer) -> float:
    """Of every token of the held-out text, in windows of 512."""
    total, count = 0.0, 0
    for row in held_out_windows(tokenizer):
        total += F.cross_entropy(model(row[None, :-1])[0], row[1:], reduction="sum").item()
        count += len(row) - 1
    return math.exp(total / count)


@torch.inference_mode()
def acceptance(draft: Llama, target: Llama, tokenizer: Tokenizer) -> dict[str, float]:
    """How often the draft proposes what tiny says: greedy on trained answers and held-out text, and when sampling."""
    same, count = 0, 0
    for group, rows in batched(asked_questions(tokenizer)):
        agree = draft(rows).argmax(-1) == target(rows).argmax(-1)
        for row, q in enumerate(group):
            start = len(q.prompt) - 1
            same += int(agree[row, start : start + len(q.answer)].sum())
            count += len(q.answer)
    greedy, overlap, seen = 0, 0.0, 0
    for row in held_out_windows(tokenizer):
        p, q = target(row[None, :-1])[0].softmax(-1), draft(row[None, :-1])[0].softmax(-1)
        greedy += int((p.argmax(-1) == q.argmax(-1)).sum())
        overlap += float(torch.minimum(p, q).sum())
        seen += len(row) - 1
    return {"trained, greedy": same / count, "held-out, greedy": greedy / seen, "held-out, sampled": overlap / seen}


def check(name: str, show: int) -> None:
    """Print the scores of the saved weights."""
    tokenizer, model = load_tokenizer(), load_model(name)
    questions = asked_questions(tokenizer)
    for precision, words in PRECISIONS.items():
        model.precision = precision
        wrong = wrong_answers(model, questions)
        rate = 100 * (1 - len(wrong) / len(questions))
        unsure = perplexity(model, tokenizer)
        print(f"{name}, {words}: {rate:.2f} % exact of {len(questions)}, held-out perplexity {unsure:.4f}", flush=True)
        kinds = sorted({q.kind for q in questions})
        shares = [(kind, sum(q.kind == kind for q in wrong), sum(q.kind == kind for q in questions)) for kind in kinds]
        print("    wrong: " + ", ".join(f"{kind} {bad}/{all_}" for kind, bad, all_ in shares))
        for q in wrong[:show]:
            print(f"    {q.kind}: {q.text!r} -> {tokenizer.decode(q.answer)!r}")
    if name == "tiny-draft":
        model.precision = "float"
        for words, rate in acceptance(model, load_model("tiny"), tokenizer).items():
            print(f"{name}, accepted by tiny, {words}: {100 * rate:.2f} %")


# --- the command -----------------------------------------------------------------------------------------------------


def write_first_versions() -> None:
    """The tokenizer and weights of the final shapes, so that others can build before training is done."""
    tokenizer = train_tokenizer()
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        write_tokenizer(tokenizer, MODELS_DIR / name)
        save_model(Llama(config), MODELS_DIR / name)
    print(f"wrote {', '.join(CONFIGS)} with random weights")


def parse_arguments() -> argparse.Namespace:
    """The command line; its help is the usage in the docstring above and one line for each option."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", nargs="?", choices=["tokenizer", "train", "check"], default="check")
    parser.add_argument("model", nargs="?", choices=list(CONFIGS), default="tiny")
    parser.add_argument("--check", action="store_true", help="score the saved weights (after training, if both)")
    parser.add_argument("--show", type=int, default=3, metavar="N", help="wrong answers to print (default 3)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    parser.add_argument("--checkpoint", type=Path, help="default: MODEL.checkpoint in the temporary folder")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--steps", type=int, default=3000, help="training steps (default 3000)")
    parser.add_argument("--rows", type=int, default=8, help="rows of a batch (default 8)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row (default 256)")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate (default 2e-3)")
    parser.add_argument("--seed", type=int, default=1, help="of weights and order (default 1)")
    parser.add_argument(
        "--float-part", type=float, default=0.55, help="steps before quantisation (default 0.55 of all)"
    )
    parser.add_argument("--stop-after", type=float, default=0, metavar="MINUTES", help="stop early; --resume goes on")
    return parser.parse_args()


def main() -> None:
    """Run one action."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    if args.action == "tokenizer":
        write_first_versions()
    if args.action == "train":
        plan = Plan(args.steps, args.rows, args.length, args.rate, args.seed, args.float_part)
        checkpoint = args.checkpoint or Path(tempfile.gettempdir()) / f"{args.model}.checkpoint"
        train(args.model, plan, checkpoint, args.resume, args.stop_after)
    if args.check or args.action == "check":
        check(args.model, args.show)


if __name__ == "__main__":
    main()
