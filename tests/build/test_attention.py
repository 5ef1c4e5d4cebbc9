"""Attention over pages against numpy: every kind of page, over shapes with tails; needs TVM."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tvm
from kernel_calls import HAS_VNNI, build, codes_for

from engine.machine import get_cpu_features
from mlcbuild.compiler.kernels import attention, bf16, quantize_rows
from mlcbuild.compiler.kernels.kv_pages import choose_dtype, choose_vnni, make_kind
from mlcbuild.compiler.kernels.kv_place import Heads
from mlcbuild.recipes.schema import Quantization

HAS_AVX_VNNI = "avx_vnni" in (get_cpu_features() or ())
HAS_BF16 = bf16.FEATURE in (get_cpu_features() or ())
needs_bf16 = pytest.mark.skipif(not HAS_BF16, reason="this processor has no AVX512-BF16")
needs_vnni = pytest.mark.skipif(not HAS_VNNI, reason="this processor has no AVX512-VNNI")
needs_avx_vnni = pytest.mark.skipif(not HAS_AVX_VNNI, reason="this processor has no AVX-VNNI")
VNNI = [
    pytest.param("int8, avx512_vnni", marks=needs_vnni),
    pytest.param("int8, avx_vnni", marks=needs_avx_vnni),
]
DTYPES = ["float32", "float16", pytest.param("bfloat16", marks=needs_bf16), "int8", *VNNI]
TARGETS = {"bfloat16": "x86-64-v4-bf16", "int8": {0: "x86-64-v3", 8: "x86-64-v3-vnni", 16: "x86-64-v4-vnni"}}
SHAPES = [(8, 4, 32), (8, 2, 64), (7, 1, 64), (2, 2, 128), (20, 1, 32), (5, 5, 96)]
CASES = [
    *(("float32", *shape) for shape in SHAPES),
    *(("float16", *shape) for shape in SHAPES[1:3]),
    *(pytest.param("bfloat16", *shape, marks=needs_bf16) for shape in SHAPES[1:]),
    *(("int8", *shape) for shape in SHAPES[2:5]),
    *(pytest.param("int8, avx512_vnni", *shape, marks=needs_vnni) for shape in SHAPES),
    *(pytest.param("int8, avx_vnni", *shape, marks=needs_avx_vnni) for shape in SHAPES[1:4]),
]
# of the L2 norm: keys and values are rounded as they are kept, for bfloat16 queries and weights too; those of int8 are
# compared with what the pages hold, those of vnni for rounded queries
TOLERANCES = {"float32": 2e-6, "float16": 5e-4, "bfloat16": 4e-3, "int8": 2e-6}
TOLERANCES |= {"int8, avx512_vnni": 1e-3, "int8, avx_vnni": 1e-3}


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def make_heads(dtype, heads, kv_heads, head_dim, layers=1, window=0):
    """Heads of a dtype in DTYPES."""
    name, _, vnni = dtype.partition(", ")
    vnni = choose_vnni([vnni])
    sums = 16 if HAS_VNNI and (name != "int8" or vnni == 16) else 4  # as TARGETS and kernel_calls.build have registers
    return Heads(layers, heads, kv_heads, head_dim, name, window, vnni, sums)


def make(kernel, h, **options):
    """A kernel for pages of this dtype."""
    target = TARGETS.get(h.dtype)
    return build(kernel(h, **options), target[h.vnni] if isinstance(target, dict) else target)


def make_pages(h, count):
    """Pages of NaN: what was never written must never be read."""
    stored = make_kind(h).stored
    shape = (h.layers, count, 2, h.kv_heads, 16, h.row)
    return np.full(shape, {"uint16": 0x7FC0, "int8": -1}.get(stored, np.nan), stored)


def fill_pages(rng, h, count):
    """Pages of random numbers."""
    numbers = rng.normal(size=(h.layers, count, 2, h.kv_heads, 16, h.head_dim)).astype(np.float32)
    if h.dtype == "bfloat16":
        return (numbers.view(np.uint32) >> 16).astype(np.uint16)
    if h.dtype != "int8":
        return numbers.astype(h.dtype)
    codes = rng.integers(-127, 128, (*numbers.shape[:4], 16 * h.head_dim)).astype(np.int8)
    scales = np.abs(numbers[..., 0]).view(np.int8)
    return np.concatenate([codes, scales], -1).reshape(*numbers.shape[:5], h.row)


def read_pages(h, pages, layer, table, length):
    """[2, length, kv_heads, head_dim]: what int8 pages of one sequence stand for."""
    d, found = h.head_dim, pages[layer, table].reshape(-1, 2, h.kv_heads, 16 * h.row)
    codes, scales = found[..., : 16 * d], found[..., 16 * d :].copy().view(np.float32)[..., None]
    if h.vnni:
        fours = (codes[:, 0] ^ np.int8(-128)).reshape(-1, h.kv_heads, d // 4, 16, 4)
        keys = fours.swapaxes(2, 3).reshape(-1, h.kv_heads, 16, d)
        values = codes[:, 1].reshape(-1, h.kv_heads, 8, d, 2).swapaxes(3, 4).reshape(-1, h.kv_heads, 16, d)
    else:
        keys = codes[:, 0].reshape(-1, h.kv_heads, d, 16).swapaxes(2, 3)
        values = codes[:, 1].reshape(-1, h.kv_heads, 16, d)
    both = keys * scales[:, 0], values * scales[:, 1]
    return np.stack([t.swapaxes(1, 2).reshape(-1, h.kv_heads, d)[:length] for t in both])


def round_queries(h, q):
    """Queries as they are multiplied."""
    steps = np.abs(q).max(-1, keepdims=True) / 127
    return np.rint(q / steps) * steps if h.vnni else q


def check_codes(found, wanted):
    """Keys and values of int8 pages are off by half a step at most."""
    steps = np.abs(wanted).max(-1, keepdims=True) / 127
    assert (np.abs(found - wanted) <= 0.5001 * steps).all()


def make_rope(rng, n, d):
    """(table, cos, sin) of random angles."""
    angle = rng.normal(size=(n, d // 2)).astype(np.float32)
    return np.concatenate([np.cos(angle), np.sin(angle)], -1), np.cos(angle)[:, None], np.sin(angle)[:, None]


def attend(q, positions, rows, history, window=0):
    """numpy: token m sees its own sequence up to its position; history is {row: [2, length, kv_heads, d]}."""
    out = np.zeros(q.shape)
    for m, (position, row) in enumerate(zip(positions, rows, strict=True)):
        for head in range(q.shape[1]):
            source = head // (q.shape[1] // history[row][0].shape[1])
            begin = max(0, position + 1 - window) if window else 0
            keys, values = (t[begin : position + 1, source].astype(np.float64) for t in history[row])
            scores = keys @ q[m, head] / np.sqrt(q.shape[2])
            p = np.exp(scores - scores.max())
            out[m, head] = p @ values / p.sum()
    return out


@pytest.mark.parametrize(("dtype", "heads", "kv_heads", "d"), CASES)
def test_attention_over_pages(rng, dtype, heads, kv_heads, d):
    """Chunks of two sequences, mixed with single tokens, appended and attended through a shuffled page table."""
    h = make_heads(dtype, heads, kv_heads, d, layers=2)
    append, attend_kernel = make(attention.make_rope_append, h), make(attention.make_attention, h)
    pages, table = make_pages(h, 40), rng.permutation(40).astype(np.int32).reshape(2, 20)
    untouched = pages[0].copy()
    history = {0: None, 1: None}
    calls = [
        ([0] * 19, range(19)),
        ([0] + [1] * 6, [19, *range(6)]),
        ([0, 1], [20, 6]),
        ([1] * 30, range(7, 37)),
        ([0] * 40 + [1] * 30, [*range(21, 61), *range(37, 67)]),  # more than one block of pages, tasks of many tokens
        ([1] * 90, range(67, 157)),
        ([1], [157]),
    ]
    for rows, positions in calls:
        rows, positions = np.array(rows, np.int32), np.array(positions, np.int32)
        n = len(rows)
        qkv = rng.normal(size=(n, h.width)).astype(np.float32)
        rope, cos, sin = make_rope(rng, n, d)
        x = qkv.reshape(n, heads + 2 * kv_heads, d).copy()
        a, b = x[:, : heads + kv_heads, : d // 2].copy(), x[:, : heads + kv_heads, d // 2 :].copy()
        x[:, : heads + kv_heads] = np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
        for m, row in enumerate(rows):
            kv = x[m, heads:].reshape(2, 1, kv_heads, d)
            history[row] = kv if history[row] is None else np.concatenate([history[row], kv], 1)
        append(qkv, pages, rope, positions, rows, table, 1)
        if h.dtype == "int8":
            for row in set(rows.tolist()):
                found = read_pages(h, pages, 1, table[row], history[row].shape[1])
                check_codes(found, history[row])
                history[row] = found
        y = np.zeros((n, heads * d), np.float32)
        attend_kernel(qkv, pages, positions, rows, table, 1, y)
        wanted = attend(round_queries(h, x[:, :heads]), positions, rows, history)
        error = np.linalg.norm(y.reshape(wanted.shape) - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)
        assert np.sqrt((error**2).mean()) < TOLERANCES[dtype]
        assert error.max() < 4 * TOLERANCES[dtype]
    np.testing.assert_array_equal(pages[0], untouched)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_does_not_depend_on_the_others(rng, dtype):
    """Its result is the same to the bit in a call alone, among its own sequence, and among others; on any threads."""
    h = make_heads(dtype, 6, 2, 64)
    append, kernel = make(attention.make_rope_append, h), make(attention.make_attention, h)
    length, table = 150, rng.permutation(20).astype(np.int32).reshape(2, 10)
    rows, positions = np.repeat([0, 1], length).astype(np.int32), np.tile(np.arange(length), 2).astype(np.int32)
    qkv, rope = rng.normal(size=(2 * length, h.width)).astype(np.float32), make_rope(rng, 2 * length, 64)[0]
    written = make_pages(h, 20)
    append(qkv, written, rope, positions, rows, table, 0)

    def run(tokens):
        y = np.zeros((len(tokens), 6 * 64), np.float32)
        kernel(qkv[tokens], written, positions[tokens], rows[tokens], table, 0, y)
        return y

    whole = run(np.arange(2 * length))
    assert np.isfinite(whole).all()
    choices = [[5], [149], [0, 150], [*range(40, 60), *range(200, 203)], [*range(100, 150), 299], [*range(130, 230)]]
    for tokens in choices:
        np.testing.assert_array_equal(run(np.array(tokens)), whole[tokens])
    threads = tvm.get_global_func("runtime.config_threadpool")
    try:
        threads(1, 1)
        np.testing.assert_array_equal(run(np.arange(2 * length)), whole)
    finally:
        threads(1, 2)


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (7, 1)])
def test_fewer_registers_give_the_same(rng, heads, kv_heads):
    """Lanes that are worked on together are told apart by registers alone: processors agree to the bit."""
    pages, table, results = None, rng.permutation(20).astype(np.int32).reshape(2, 10), []
    rows, positions = np.array([0] * 9 + [1], np.int32), np.array([*range(130, 139), 77], np.int32)
    for sums in (16, 4):
        h = dataclasses.replace(make_heads("float16", heads, kv_heads, 64), sums=sums)
        pages = fill_pages(rng, h, 20) if pages is None else pages
        qkv = np.random.default_rng(1).normal(size=(10, h.width)).astype(np.float32)
        results.append(np.zeros((10, heads * 64), np.float32))
        make(attention.make_attention, h)(qkv, pages, positions, rows, table, 0, results[-1])
    assert np.isfinite(results[0]).all()
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("dtype", ["float32", *DTYPES[2:]])
@pytest.mark.parametrize("window", [1, 20, 130, 1000])
def test_a_sliding_window(rng, dtype, window):
    """Prompts and lone tokens, whose windows begin in any block, or before the first position."""
    h = make_heads(dtype, 6, 2, 64, window=window)
    append, kernel = make(attention.make_rope_append, h), make(attention.make_attention, h)
    length, table = 420, rng.permutation(27).astype(np.int32)[None]
    rows, positions = np.zeros(length, np.int32), np.arange(length, dtype=np.int32)
    qkv, pages = rng.normal(size=(length, h.width)).astype(np.float32), make_pages(h, 27)
    append(
        qkv,
        pages,
        np.concatenate([np.ones((length, 32)), np.zeros((length, 32))], -1).astype(np.float32),
        positions,
        rows,
        table,
        0,
    )
    x = qkv.reshape(length, 10, 64)
    history = {0: read_pages(h, pages, 0, table[0], length) if h.dtype == "int8" else [x[:, 6:8], x[:, 8:]]}
    whole = np.zeros((length, 384), np.float32)
    kernel(qkv, pages, positions, rows, table, 0, whole)
    wanted = attend(round_queries(h, x[:, :6]), positions, rows, history, window)
    error = np.linalg.norm(whole.reshape(wanted.shape) - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)
    assert np.sqrt((error**2).mean()) < TOLERANCES[dtype]
    for tokens in ([3], [129], [419], [*range(140, 180)]):
        y = np.zeros((len(tokens), 384), np.float32)
        kernel(qkv[tokens], pages, positions[tokens], rows[tokens], table, 0, y)
        np.testing.assert_array_equal(y, whole[tokens])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 20, 130])
def test_runs_of_any_length(rng, dtype, window):
    """One to six tokens of a sequence, as guesses are checked: mixed, in small and large calls, up to its last."""
    h = make_heads(dtype, 6, 2, 64, window=window)
    append, kernel = make(attention.make_rope_append, h), make(attention.make_attention, h)
    lengths, table = [6, 47, 129, 203], rng.permutation(52).astype(np.int32).reshape(4, 13)
    rows = np.repeat(np.arange(4, dtype=np.int32), lengths)
    positions = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
    qkv, pages = rng.normal(size=(len(rows), h.width)).astype(np.float32), make_pages(h, 52)
    append(qkv, pages, np.tile(np.float32([1] * 32 + [0] * 32), (len(rows), 1)), positions, rows, table, 0)
    x, history = qkv.reshape(-1, 10, 64), {}
    for row, length in enumerate(lengths):
        mine = x[rows == row]
        history[row] = read_pages(h, pages, 0, table[row], length) if h.dtype == "int8" else [mine[:, 6:8], mine[:, 8:]]
    begins = np.cumsum([0, *lengths[:-1]])
    last = [(row, lengths[row] - count, count) for row in range(4) for count in range(1, 7)]
    inner = [(row, rng.integers(lengths[row] - count + 1), count) for row, _, count in last]
    for runs in (last[:5], last[-5:], [*last[9:13], *inner[16:20]], rng.permutation([*last, *inner])):
        tokens = np.concatenate([np.arange(count) + begins[row] + start for row, start, count in runs])
        y = np.zeros((len(tokens), 384), np.float32)
        kernel(qkv[tokens], pages, positions[tokens], rows[tokens], table, 0, y)
        wanted = attend(round_queries(h, x[tokens, :6]), positions[tokens], rows[tokens], history, window)
        error = np.linalg.norm(y.reshape(wanted.shape) - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)
        assert np.sqrt((error**2).mean()) < TOLERANCES[dtype]
        for i, token in enumerate(tokens):
            alone = np.zeros((1, 384), np.float32)
            kernel(qkv[[token]], pages, positions[[token]], rows[[token]], table, 0, alone)
            np.testing.assert_array_equal(y[i], alone[0])


@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(8, 2, 64), (3, 1, 32), (5, 1, 64), (16, 1, 32)])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_attention_quantizes_as_its_parts(rng, heads, kv_heads, d, dtype):
    """Codes straight from attention are those of its plain results, to the last bit; also of a padded row."""
    h = make_heads(dtype, heads, kv_heads, d, layers=2)  # as above, so that the kernel is the same
    plain, fused = make(attention.make_attention, h), make(attention.make_attention, h, zero=7)
    quantizer = build(quantize_rows.make_quantize_rows(heads * d, zero=7))
    pages = fill_pages(rng, h, 12)
    table = rng.permutation(12).astype(np.int32).reshape(2, 6)
    for n in (1, 2, 5, 66):
        rows, positions = np.zeros(n, np.int32), np.arange(20, 20 + n, dtype=np.int32)
        if n == 2:
            rows, positions = np.array([0, 1], np.int32), np.array([70, 3], np.int32)
        qkv = rng.normal(size=(n, h.width)).astype(np.float32)
        y, wanted, got = np.zeros((n, heads * d), np.float32), codes_for(n, heads * d), codes_for(n, heads * d)
        for a in (*wanted, *got):
            a[...] = 77  # what pads a row must be written too
        plain(qkv, pages, positions, rows, table, 0, y)
        quantizer(y, *wanted)
        fused(qkv, pages, positions, rows, table, 0, *got)
        for a, b in zip(wanted, got, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=f"{n} rows")


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_activations_stay_finite(rng, dtype):
    """One huge score, outliers, zeros and denormals give no NaN; a lone huge score takes all of the weight."""
    h, n = make_heads(dtype, 4, 2, 32), 140
    append, kernel = make(attention.make_rope_append, h), make(attention.make_attention, h)
    pages, table = make_pages(h, 9), np.arange(9, dtype=np.int32)[None]
    qkv = rng.choice(np.array([1e4, -1e4, 0.0, 1e-40, -1e-40, 1.0], np.float32), (n, h.width))
    qkv[0], qkv[1] = 0, 1e-40
    qkv[130] = 1e3
    rope = np.concatenate([np.ones((n, 16)), np.zeros((n, 16))], -1).astype(np.float32)
    positions, rows, y = np.arange(n, dtype=np.int32), np.zeros(n, np.int32), np.zeros((n, 128), np.float32)
    append(qkv, pages, rope, positions, rows, table, 0)
    kernel(qkv, pages, positions, rows, table, 0, y)
    assert np.isfinite(y).all()
    np.testing.assert_array_equal(y[0], 0)
    first = np.array([1e4] * 32, np.float32)
    qkv = np.tile(np.float32(1e-3), (n, h.width)).astype(np.float32)
    qkv[7, 128:192], qkv[:, :128] = 1e3, 1.0  # position 7 has the only large keys
    qkv[7, 192:] = np.tile(first, 2)
    append(qkv, pages, rope, positions, rows, table, 0)
    kernel(qkv, pages, positions, rows, table, 0, y)
    np.testing.assert_allclose(y[7:], 1e4, rtol=TOLERANCES[dtype])


def test_pages_are_bfloat16_where_the_processor_multiplies_it_and_activations_may_be_rounded():
    whole = Quantization(name="q0f16", method="plain", bits=16, dtype="float16")
    bytes_ = whole.model_copy(update={"activations": "int8"})
    assert choose_dtype(bytes_, ["avx512_bf16"]) == "bfloat16"
    assert choose_dtype(bytes_, ["avx512_vnni"]) == "float16"
    assert choose_dtype(whole, ["avx512_bf16"]) == "float16"
    assert choose_dtype(bytes_.model_copy(update={"dtype": "float32"}), ["avx512_bf16"]) == "float32"
    assert choose_dtype(bytes_.model_copy(update={"kv": "int8"}), ["avx512_bf16"]) == "int8"
    narrow = whole.model_copy(update={"dtype": "bfloat16", "activations": "bfloat16"})
    assert choose_dtype(narrow, ["avx512_bf16"]) == "bfloat16"
    assert choose_dtype(narrow, ["avx512_vnni"]) == "float16"


def test_bytes_are_multiplied_by_the_widest_products_that_the_processor_has():
    assert [choose_vnni(has) for has in (["avx2"], ["avx_vnni"], ["avx_vnni", "avx512_vnni"])] == [0, 8, 16]


@needs_vnni
@needs_avx_vnni
def test_both_widths_of_products_give_the_same(rng):
    """Pages and results, to the last bit."""
    rows, positions = np.zeros(90, np.int32), np.arange(90, dtype=np.int32)
    table, made = rng.permutation(6).astype(np.int32)[None], []
    qkv, rope = rng.normal(size=(90, 768)).astype(np.float32), make_rope(rng, 90, 64)[0]
    for name in ("int8, avx512_vnni", "int8, avx_vnni"):
        h = make_heads(name, 8, 2, 64)
        pages, mine, y = make_pages(h, 6), qkv.copy(), np.zeros((90, 512), np.float32)
        make(attention.make_rope_append, h)(mine, pages, rope, positions, rows, table, 0)
        make(attention.make_attention, h)(mine, pages, positions, rows, table, 0, y)
        made.append((pages, y))
    for wide, narrow in zip(*made, strict=True):
        np.testing.assert_array_equal(wide, narrow)
