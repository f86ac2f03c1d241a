"""kernels/attention.py in Triton's interpreter, against double precision written out here.

The rule for every tolerance: the kernel's error is at most twice that of the specification run in
the kernel's number format. Lengths end inside, at, and one past a tile of 32."""

import sys

import pytest
import torch

from kernels.attention import (anywhere, attention, causal, compile_cases, full, document_spans, reference,
                               seen_matrix, visible)
from qformer import itc, itg, itm
from tiny import span_errors

MODULE = sys.modules["kernels.attention"]           # `kernels.attention` itself is the function


def spanless(q, k, n):                              # its span is unknown: scanned in full
    return (k == q) | (k < n)


def grid(seen):
    return "\n".join("".join(".#"[v] for v in row) for row in seen.tolist())


@pytest.mark.parametrize("rule, drawn", [
    (causal, "#.....\n##....\n###...\n####..\n#####.\n######"),
    (full, "\n".join(["######"] * 6)),
    (itc, "##....\n##....\n..####\n..####\n..####\n..####"),
    (itm, "\n".join(["######"] * 6)),
    (itg, "##....\n##....\n###...\n####..\n#####.\n######")])
def test_rules_as_drawn(rule, drawn):
    assert grid(visible(rule, 6, 6, n=2)) == drawn


def test_packed_documents_as_drawn():
    q = torch.zeros(2, 5, 1, 8)
    seen = seen_matrix(q, q, causal, 0, 0, None, document_spans([[2, 0, 3], [1, 4]]))
    assert grid(seen[0, 0]) == "#....\n##...\n..#..\n..##.\n..###"
    assert grid(seen[1, 0]) == "#....\n.#...\n.##..\n.###.\n.####"
    # a rule with n counts from each document's start: one query, then text
    assert grid(seen_matrix(q, q, itc, 1, 0, None, document_spans([[2, 3]] * 2))[0, 0]) == (
        "#....\n.#...\n..#..\n...##\n...##")
    with pytest.raises(ValueError, match="equally long"):
        document_spans([[2, 3], [4]])


@pytest.mark.parametrize("rule", [causal, full, itc, itm, itg])
def test_no_rule_is_true_outside_its_span(rule):
    assert span_errors(rule, (rule.keys, rule.queries)) == 0
    assert span_errors(rule, (anywhere, anywhere)) == 0


def test_a_wrong_span_is_found():
    assert span_errors(causal, (lambda lo, hi, n, end: (0, hi - 1, 0, 0), anywhere))    # too short
    assert span_errors(causal, (lambda lo, hi, n, end: (0, hi, 0, hi), anywhere))       # too sure
    assert span_errors(itg, (itg.keys, causal.queries))


def test_spans_leave_work_out():
    """Under causal, of 8 x 8 tiles: 36 visited, of which 28 without a question."""
    spans = [causal.keys(16 * i, 16 * i + 16, 0, 128) for i in range(8)]
    assert sum(-(-last // 16) for _, last, _, _ in spans) == 36
    assert sum(outer // 16 for _, _, _, outer in spans) == 28


# ------------------------------------------------------------------------------- the numbers

def inputs(B, T, S, H, G, D, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return [torch.randn(B, L, heads, D).to(dtype) for L, heads in ((T, H), (S, G), (S, G), (T, H))]


def exact(q, k, v, seen):
    """Attention in double precision; a row that sees nothing is 0."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = (q @ k.mT / q.shape[-1] ** .5).masked_fill(~seen, -1e300)
    return (scores.softmax(-1) * seen @ v).transpose(1, 2)


def with_gradients(path, q, k, v, dout):
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    out = path(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]


def error(got, true):
    return float((got.double() - true).norm() / true.norm())


def compare(q, k, v, dout, *mask):
    """Kernel and specification against double precision: out, dq, dk, dv."""
    seen = seen_matrix(q, k, *mask)
    true = with_gradients(lambda *x: exact(*x, seen), *(t.double() for t in (q, k, v, dout)))
    kernel = with_gradients(lambda *x: attention(*x, *mask), q, k, v, dout)
    spec = with_gradients(lambda *x: reference(*x, *mask), q, k, v, dout)
    for name, a, b, c in zip(("out", "dq", "dk", "dv"), kernel, spec, true):
        assert a.dtype == q.dtype and a.shape == c.shape and a.isfinite().all()
        assert error(a, c) <= 2 * error(b, c) > 0, f"{name}: {error(a, c):.1e}, {error(b, c):.1e}"
    return kernel, true


@pytest.mark.parametrize("rule, B, T, S, H, G, D, n, start", [
    (causal, 2, 37, 37, 2, 2, 64, 0, 0),
    (causal, 1, 65, 65, 4, 1, 88, 0, 0),            # EVA's head size, four query heads a key head
    (full, 1, 64, 64, 1, 1, 128, 0, 0),
    (full, 1, 33, 70, 2, 1, 64, 0, 0),              # cross-attention
    (causal, 1, 5, 70, 2, 1, 64, 0, 65),            # behind a cache
    (causal, 1, 40, 70, 1, 1, 40, 0, 20),           # the last keys seen by nobody: their dk is 0
    (itc, 1, 70, 70, 1, 1, 64, 34, 0),
    (itg, 1, 70, 70, 2, 1, 64, 33, 0),
    (itg, 1, 70, 70, 1, 1, 64, 32, 0),
    (spanless, 1, 40, 40, 1, 1, 24, 1, 0)])
def test_kernel_equals_double_precision(rule, B, T, S, H, G, D, n, start):
    compare(*inputs(B, T, S, H, G, D), rule, n, start, None, None)


@pytest.mark.parametrize("rule, D", [(causal, 88), (full, 64)])
def test_kernel_in_half_precision(rule, D):
    kernel, true = compare(*inputs(1, 65, 65, 2, 1, D, torch.float16), rule, 0, 0, None, None)
    assert error(kernel[0], true[0]) < 2e-3
    assert error(kernel[0].flip(1), true[0]) > .1           # control


def test_577_rows_of_a_picture_with_larger_tiles(monkeypatch):
    monkeypatch.setattr(MODULE, "SMALL", (128, 64, 4, 1))
    compare(*inputs(1, 577, 577, 1, 1, 64), full, 0, 0, None, None)


def test_a_row_that_sees_one_key_returns_its_value():
    q, k, v, dout = inputs(1, 33, 33, 2, 1, 64)
    (out, dq, _, dv), _ = compare(q, k, v, dout, causal, 0, 0, None, None)
    assert torch.equal(out[:, 0], v[:, 0].expand(1, 2, 64))
    assert float(dq[:, 0].abs().max()) < 1e-6               # a softmax over one key is flat

    def itself(q, k, n):
        return q == k

    q, k, v, dout = inputs(1, 40, 40, 1, 1, 8)
    out, dq, dk, dv = with_gradients(lambda *x: attention(*x, itself), q, k, v, dout)
    assert torch.equal(out, v) and torch.allclose(dv, dout) and float(dk.abs().max()) < 1e-5


@pytest.mark.parametrize("rule, n", [(causal, 0), (full, 0), (itg, 2)])
def test_packed_documents_do_not_see_each_other(rule, n):
    q, k, v, dout = inputs(2, 79, 79, 1, 1, 64)
    doc_spans = document_spans([[37, 1, 1, 40], [3, 64, 12]])
    (out, *_), _ = compare(q, k, v, dout, rule, n, 0, None, doc_spans)
    alone = attention(*(t[:1, 39:] for t in (q, k, v)), rule, n)
    assert torch.allclose(out[:1, 39:], alone, atol=1e-6)
    assert not torch.allclose(attention(q, k, v, rule, n), out, atol=1e-2)      # control


@pytest.mark.parametrize("rule, doc_spans", [(causal, None), (full, document_spans([[39, 1, 30]] * 2))])
def test_padding_is_not_seen(rule, doc_spans):
    q, k, v, dout = inputs(2, 70, 70, 1, 1, 64)
    attention_mask = torch.rand(2, 70) < .7
    attention_mask[:, [0, 39, 45]] = True
    attention_mask[1, 33:39] = False
    (out, dq, dk, dv), _ = compare(q, k, v, dout, rule, 0, 0, attention_mask, doc_spans)
    assert dk[~attention_mask].eq(0).all() and dv[~attention_mask].eq(0).all() and dk[attention_mask].ne(0).any()
    other = torch.where(attention_mask[..., None, None], v, 100.)
    assert torch.equal(attention(q, k, other, rule, 0, 0, attention_mask, doc_spans), out)


def test_a_row_whose_keys_are_all_padding_is_finite():
    """Padding on the left, looking at padding: 0 and no gradient; the other rows are right."""
    q, k, v, dout = inputs(1, 40, 40, 1, 1, 8)
    attention_mask = torch.arange(40)[None] >= 35
    seen = seen_matrix(q, k, causal, 0, 0, attention_mask, None)
    true = with_gradients(lambda *x: exact(*x, seen), *(t.double() for t in (q, k, v, dout)))
    got = with_gradients(lambda *x: attention(*x, causal, attention_mask=attention_mask), q, k, v, dout)
    assert all(float((a - b).abs().max()) < 1e-5 for a, b in zip(got, true))
    assert got[0][:, :35].eq(0).all() and got[1][:, :35].eq(0).all()


def test_views_of_one_fused_projection_and_of_a_cache():
    """q, k, v as slices of (B, T, H + 2 G, D); the same numbers as from copies, bit for bit."""
    torch.manual_seed(0)
    qkv = torch.randn(2, 33, 4, 8)
    q, k, v = qkv.split((2, 1, 1), dim=2)
    heads_first = torch.randn(2, 2, 33, 8).transpose(1, 2)
    dout = torch.randn(2, 33, 2, 8)
    for a in (q, heads_first):
        assert not a.is_contiguous()
        strided = with_gradients(attention, a, k, v, dout.transpose(0, 1).clone().transpose(0, 1))
        copied = with_gradients(attention, *(t.contiguous() for t in (a, k, v)), dout)
        assert all(torch.equal(x, y) for x, y in zip(strided, copied))
    cache = torch.randn(2, 1, 50, 1, 8)[:, :, :40].squeeze(1)
    assert torch.equal(attention(q, cache, cache, causal, start=3),
                       attention(q, cache.contiguous(), cache.contiguous(), causal, start=3))


def test_two_runs_are_bit_equal():
    x = inputs(1, 40, 40, 2, 1, 8)
    one, two = (with_gradients(attention, *x) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two))


@pytest.mark.parametrize("B, T, S", [(0, 5, 5), (1, 0, 5), (0, 0, 0)])
def test_nothing_in_nothing_out(B, T, S):
    q, k, v, dout = inputs(B, T, S, 2, 1, 8)
    got = with_gradients(lambda *x: attention(*x, full), q, k, v, dout)
    assert [t.shape for t in got] == [q.shape, q.shape, k.shape, v.shape]
    assert all(t.eq(0).all() for t in got)


# ------------------------------------------------------------------------------- bad input

def test_what_the_kernel_cannot_answer_is_refused(grounded):
    q, k, v, _ = inputs(1, 4, 4, 2, 1, 8)
    attention_mask, doc_spans = torch.ones(1, 4, dtype=torch.bool), document_spans([[4]])

    def never(q, k, n):
        return q < k

    for message, call in {
        "float64; the kernel takes": lambda: attention(q.double(), k.double(), v.double()),
        "must be alike": lambda: attention(q, k.half(), v.half()),
        "head size 12": lambda: attention(*inputs(1, 4, 4, 2, 1, 12)[:3]),
        "head size 136": lambda: attention(*inputs(1, 4, 4, 2, 1, 136)[:3]),
        r"strides .* of q; the last must be 1":
            lambda: attention(q.transpose(2, 3).contiguous().transpose(2, 3), k, v),
        r"strides .* of k; .* multiples of 8": lambda: attention(
            q, torch.zeros(1, 4, 12)[..., None, :8], v),
        "bfloat16 in Triton's interpreter": lambda: attention(*(t.bfloat16() for t in (q, k, v))),
        "must be bool": lambda: attention(q, k, v, attention_mask=attention_mask.float()),
        r"attention_mask \(1, 3\)": lambda: attention(q, k, v, attention_mask=attention_mask[:, :3]),
        "must be int32": lambda: attention(q, k, v, doc_spans=doc_spans.long()),
        "packed rows need": lambda: attention(q, k, v, start=1, doc_spans=doc_spans),
        "never hides every one of 4 keys": lambda: attention(q, k, v, never),
        "causal hides every one of 0 keys": lambda: attention(q, k[:, :0], v[:, :0]),
        "a lambda cannot be compiled": lambda: attention(q, k, v, lambda q, k, n: k <= q),
        "on cpu, meta": lambda: attention(q, k, v.to("meta")),
        "cpu, meta; move them to one": lambda: attention(q, k, v, attention_mask=attention_mask.to("meta")),
        "q must be": lambda: attention(q[0], k, v),
        r"k \(4, 1, 8\)": lambda: attention(q, k[0], v[0]),
        "do not fit": lambda: attention(q, k.expand(2, 4, 1, 8), v.expand(2, 4, 1, 8)),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(AssertionError, match="launched"):   # control: nothing was wrong but that
        attention(q, k, v)


def test_every_shipped_tile_is_offered_to_the_compiler():
    cases = compile_cases()
    for case in cases:
        assert list(case["signature"]) == case["kernel"].arg_names
        assert set(case["constexprs"]) == {a for a, t in case["signature"].items()
                                           if t == "constexpr"}
        assert case["divisible"] <= set(case["signature"]) - set(case["constexprs"])
    tiles = {(c["sm"], c["constexprs"]["BLOCK_D"], c["constexprs"]["BLOCK"],
              c["constexprs"]["STEP"], c["num_warps"], c["num_stages"]) for c in cases}
    shipped = {(*key, *tile) for key, row in MODULE.TILES.items() for tile in row.values()}
    # of fp32 the ones whose loops spilled: backward's, of the largest heads
    fp32 = {(sm, 128, *MODULE.FLOAT_TILES[128][name]) for sm in (80, 90) for name in ("dq", "dkv")}
    assert tiles == shipped | fp32 and not shipped & fp32


@pytest.mark.parametrize("rule, T, S, G", [(causal, 65, 65, 2), (full, 33, 70, 4), (itg, 40, 40, 1)])
def test_gradients_are_written_whole(rule, T, S, G, monkeypatch):
    """Their memory is not cleared first: NaN in it would be seen."""
    new_empty = torch.Tensor.new_empty

    def poisoned(x, *size, **how):
        return new_empty(x, *size, **how).fill_(torch.nan)
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    mask = torch.ones(2, S, dtype=torch.bool)
    mask[1, S // 2] = False
    leaves = [torch.randn(2, n, heads, 16, requires_grad=True) for n, heads in (
        (T, 4), (S, G), (S, G))]
    out = attention(*leaves, rule, 8, 0, mask)
    for grad in torch.autograd.grad(out, leaves, torch.randn_like(out)):
        assert grad.isfinite().all()
    for empty in (leaves[0][:, :0], leaves[0][:0]):         # no queries, no samples
        rows = [empty, *(t[:len(empty)] for t in leaves[1:])]
        out = attention(*rows, full)
        grads = torch.autograd.grad(out.sum(), leaves)
        assert all((grad == 0).all() for grad in grads)
