"""kernels/attention.py: softmax(q kᵀ / √D) v under any mask, without the score matrix.

For one query row, with sⱼ = q · kⱼ / √D over the keys j that the row may see:

    out = Σⱼ pⱼ vⱼ        pⱼ = exp(sⱼ) / l = exp(sⱼ - lse)        l = Σⱼ exp(sⱼ),  lse = log l

Written as two matrix products, the scores (B, H, T, S) travel to memory and back. One layer of a
7B LLaMA over a packed row of 8,192 tokens (H = 32, D = 128, 2 bytes a number):

    q, k, v, out once each      4 · 8,192 · 4,096 · 2 B   =  0.27 GB   all the kernel moves
    the scores once             32 · 8,192² · 2 B         =  4.3  GB   written, read, written ...

FlashAttention-2 [FA2] 2307.08691 keeps a tile of queries in registers, the memory inside a
processor, and walks over tiles of keys. The softmax needs its row maximum m before the first exp,
and the maximum is known only at the end. So each tile works with the largest score so far. When a
later tile has a larger one, m', all that was summed is multiplied by α = exp(m - m'):

    m' = max(m, max s)    α = exp(m - m')    l ← α l + Σ exp(s - m')    acc ← α acc + exp(s - m') v

    scores 1 | 3:    m = 1, l = e⁰ = 1;    then m' = 3, α = e⁻² = 0.135, l = 0.135 · 1 + e⁰ = 1.135

At the end out = acc / l and lse = m + log l. Kept for backward:

    q, k, v      (B, T, H, D), twice (B, S, G, D)    the scores s are computed again from q and k
    lse          (B, H, T), fp32: one number a row   p = exp(s - lse), without maximum and sum
    out          (B, T, H, D)                        softmax's backward subtracts Δ = dout · out

and nothing of the size T x S. Kernels count in powers of two (exp2 is the instruction): scores ·
log₂e, and lse is a log₂. All sums are fp32, whatever the inputs are.

A mask is a rule, "may query q see key k?", in plain Python on absolute positions:

    def causal(q, k, n): return k <= q          # # . . .      row q, column k
                                                # # # . .
                                                # # # # .
                                                # # # # #

The rule is called on a column of query positions and a row of key positions; `n` is a number that
some rules need (a Q-Former's queries come first, n of them). The same function runs in PyTorch and
in the kernel, which compiles it: comparisons and & | ==, no lambda.

A rule may say where it is True, so that the kernel skips tiles of which nothing is seen, and does
not ask the rule in tiles of which everything is seen. Two functions of a block of positions
lo .. hi-1, in plain arithmetic and `if` (no min, max: the kernel cuts to 0 .. end), each returning
first, last, inner, outer:

    rule.keys(lo, hi, n, end)       queries lo .. hi-1 see no key outside  first .. last-1
                                    and all of them see every key of       inner .. outer-1
    rule.queries(lo, hi, n, end)    keys lo .. hi-1 are seen by no query outside  first .. last-1
                                    and each is seen by every query of            inner .. outer-1

    causal.keys(4, 8, 0, 12) = 0, 8, 0, 5       # # # # # . . . . . . .      query 4
                                                # # # # # # # # . . . .      query 7

The queries are 4 to 7. Query 7 sees the most, the keys 0 to 7: first 0, last 8. Query 4 sees the
least, 0 to 4; these keys all four of them see: inner 0, outer 5. A rule without the two functions
is correct, and is asked in every tile.

A rule is one for the whole batch. What differs from row to row is handed over as tensors:
`attention_mask` hides padding, and `doc_spans` says where each of the texts packed into a row
begins and ends. The rule then counts positions from the start of its own text, and no text sees
another:

    # . . . .       doc_spans = document_spans([[2, 3]]) under causal
    # # . . .
    . . # . .
    . . # # .
    . . # # #

Layout: q (B, T, H, D); k, v (B, S, G, D) with H a multiple of G. Query head h reads key head
h // (H / G): grouped-query attention, [GQA] 2305.13245 section 2.2.

Alone: `python -m kernels.attention` draws the masks and compares with PyTorch's fused operation.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F

from kernels.launch import fused, INTERPRET, jit, tl, triton

# ------------------------------------------------------------------------------------ masks

def causal(q, k, n):
    return k <= q


def causal_keys(lo, hi, n, end):
    return 0, hi, 0, lo + 1


def causal_queries(lo, hi, n, end):
    return lo, end, hi - 1, end


def sliding_window(q, k, n):
    """The last n keys, the query's own included: Mistral-7B-v0.1 has n = 4,096."""
    return (k <= q) & (k > q - n)


def window_keys(lo, hi, n, end):
    return lo - n + 1, hi, hi - n, lo + 1


def window_queries(lo, hi, n, end):
    return lo, hi - 1 + n, hi - 1, lo + n


def full(q, k, n):
    return (q >= 0) & (k >= 0)


def full_span(lo, hi, n, end):
    return 0, end, 0, end


def anywhere(lo, hi, n, end):
    """The span of a rule that has none: look everywhere, ask everywhere."""
    return 0, end, 0, 0


causal.keys, causal.queries = causal_keys, causal_queries
sliding_window.keys, sliding_window.queries = window_keys, window_queries
full.keys = full.queries = full_span


def visible(allow, rows, columns, n=0, start=0, device=None):
    """The rule as a (rows, columns) bool matrix; query i stands at position start + i."""
    q = torch.arange(start, start + rows, device=device)[:, None]
    return allow(q, torch.arange(columns, device=device)[None, :], n)


def document_spans(lengths, device=None):
    """`doc_spans` for rows of texts, given their lengths: [[2, 3], [5]] has B = 2, S = 5.

    (2, B, S) int32: where the document of each position begins, and where it ends."""
    if len({sum(row) for row in lengths}) > 1:
        raise ValueError(f"document_spans: rows of {sorted({sum(row) for row in lengths})} "
                         "positions; all must be equally long (a row's padding is a document of "
                         "its own)")
    rows = []
    for row in lengths:
        size = torch.tensor(row)
        end = size.cumsum(0)
        rows.append(torch.stack((end - size, end)).repeat_interleave(size, dim=1))
    return torch.stack(rows, dim=1).to(device, torch.int32)


# ------------------------------------------------------------------------- the specification

def seen_matrix(q, k, allow, n, start, attention_mask, doc_spans):
    """Every fact about who sees whom as one bool matrix (T, S), (B, 1, 1 or T, S) with data."""
    T, S = q.shape[1], k.shape[1]
    if doc_spans is None:
        seen = visible(allow, T, S, n, start, q.device)
    else:
        begin, end = doc_spans[:, :, None, :, None]                # (B, 1, T, 1)
        i, j = (torch.arange(S, device=q.device).view(shape) for shape in ((-1, 1), (1, -1)))
        seen = allow(i - begin, j - begin, n) & (j >= begin) & (j < end)
    return seen if attention_mask is None else seen & attention_mask[:, None, None, :]


def reference(q, k, v, allow, n, start, attention_mask, doc_spans):
    """The specification, and what runs without a GPU."""
    B, T, H, D = q.shape
    S, G = k.shape[1], k.shape[2]
    if doc_spans is not None and allow in (causal, sliding_window) and attention_mask is None:
        # a document sees itself alone: one short triangle each, not a matrix as wide as the row
        rows = []
        for *row, begin in zip(q, k, v, doc_spans[0]):
            sizes = begin.unique_consecutive(return_counts=True)[1].tolist()
            rows.append(torch.cat([reference(*(t[None] for t in text), allow, n, 0, None, None)
                                   for text in zip(*(t.split(sizes) for t in row))], dim=1))
        return torch.cat(rows)
    seen = None
    if not (allow is causal and attention_mask is None and doc_spans is None and start == 0
            and T == S > 1):
        seen = seen_matrix(q, k, allow, n, start, attention_mask, doc_spans)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))               # (B, heads, length, D)
    if seen is None:
        # PyTorch's fused form skips the upper half: 1.4 x faster in training on a CPU
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != G
                                              ).transpose(1, 2)
    if S > 512:                             # past this the (T, S) matrix costs more than it saves
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=H != G
                                              ).transpose(1, 2)
    if H != G:
        k, v = (t.repeat_interleave(H // G, dim=1) for t in (k, v))
    # written out: for short full rows the fused backward is the slower one on a CPU
    scores = (q * D ** -0.5) @ k.transpose(2, 3)                   # (B, H, T, S)
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    return (scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v).transpose(1, 2)


# ------------------------------------------------------------------------------------ tiles

# (BLOCK of the rows that stay, BLOCK of the rows that are walked, warps, stages). For D up to 64
# and 128: what compiles without spilling registers in a loop (what does not fit into them goes to
# slow memory and back), on Triton 3.6, 3.7.1 and 3.9 alike.
TILES = {
    (80, 64): {"forward": (128, 64, 8, 3), "dq": (128, 32, 8, 3), "dkv": (64, 32, 4, 2)},
    (80, 128): {"forward": (128, 32, 8, 3), "dq": (128, 32, 8, 3), "dkv": (64, 64, 8, 2)},
    (90, 64): {"forward": (128, 64, 8, 3), "dq": (128, 64, 8, 2), "dkv": (128, 32, 8, 2)},
    (90, 128): {"forward": (128, 64, 8, 3), "dq": (128, 64, 8, 2), "dkv": (128, 32, 8, 2)},
}
# fp32 has no tensor cores here: every number of a tile lies in a thread's registers. With 4 warps
# and 32 x 32, D 128, the loops spill (1.7 KB of stack)
FLOAT_TILES = {
    64: {"forward": (32, 32, 8, 1), "dq": (32, 32, 8, 1), "dkv": (32, 32, 8, 1)},
    128: {"forward": (32, 16, 8, 1), "dq": (16, 16, 8, 1), "dkv": (32, 16, 8, 1)},
}
SMALL = (32, 32, 4, 1)          # the interpreter's


def sized(kernel):
    """triton.jit that compiles once for all lengths: no variant for a length of 1 or 16 m.

    Strides come in units of 8 elements, so that the compiler knows what it would have to be told:
    every row starts at a multiple of 16 bytes, the widest load."""
    sizes = "T S n start q_b q_t q_h k_b k_t k_h v_b v_t v_h".split()
    return triton.jit(kernel, do_not_specialize=sizes) if triton else kernel


@jit
def load_rows(ptr, row, stride, offs, offs_d, limit, D: tl.constexpr, BLOCK_D: tl.constexpr,
              MASKED: tl.constexpr):
    """Rows row + offs of a (limit, D) matrix; 0 outside. Only the tile's own row is 64 bits."""
    at = ptr + row.to(tl.int64) * stride + (offs[:, None] * stride + offs_d[None, :])
    if MASKED:
        return tl.load(at, mask=(row + offs < limit)[:, None] & (offs_d < D)[None, :], other=0.)
    elif D < BLOCK_D:
        return tl.load(at, mask=(offs_d < D)[None, :], other=0.)
    else:
        return tl.load(at)


@jit
def walk(span: tl.constexpr, lo, hi, end, shift, n, begin_ptr, end_ptr, PACKED: tl.constexpr,
         BLOCK: tl.constexpr):
    """The tiles to visit for positions lo .. hi-1: first, last, inner, outer, in tiles.

    Positions of the other side run to `end` and lie `shift` before their place in memory."""
    if PACKED:
        b0, e0 = tl.load(begin_ptr + lo), tl.load(end_ptr + lo)
        b1, e1 = tl.load(begin_ptr + hi - 1), tl.load(end_ptr + hi - 1)
        # the block's first document says where to begin, its last one where to stop
        first, _, inner, _ = span(lo - b0, tl.minimum(hi, e0) - b0, n, e0 - b0)
        _, last, _, outer = span(tl.maximum(lo, b1) - b1, hi - b1, n, e1 - b1)
        first, inner = tl.minimum(tl.maximum(first, 0) + b0, e0), tl.maximum(inner, 0) + b0
        last, outer = tl.minimum(tl.maximum(last, 0) + b1, e1), tl.minimum(outer + b1, e1)
        outer = tl.where(b0 == b1, outer, 0)        # two documents: no key is seen by all
    else:
        first, last, inner, outer = span(lo, hi, n, end)
    first = tl.maximum(first - shift, 0) // BLOCK
    last = tl.maximum((tl.minimum(last, end) - shift + BLOCK - 1) // BLOCK, first)
    inner = (tl.maximum(inner - shift, 0) + BLOCK - 1) // BLOCK
    outer = (tl.minimum(outer, end) - shift) // BLOCK
    inner = tl.minimum(tl.maximum(inner, first), last)
    outer = tl.minimum(tl.maximum(outer, inner), last)
    return first, last, inner, outer


@jit
def own_document(begin_ptr, end_ptr, rows, length, PACKED: tl.constexpr):
    """Where the document of each row begins and ends, as columns."""
    if PACKED:
        return (tl.load(begin_ptr + rows, mask=rows < length, other=0)[:, None],
                tl.load(end_ptr + rows, mask=rows < length, other=0)[:, None])
    else:
        return 0, 0


@jit
def ask(allow: tl.constexpr, q, k, n, begin, end, other, PACKED: tl.constexpr):
    """The rule on a tile of positions; `other` is the side that `begin` and `end` are not of."""
    if PACKED:
        return allow(q - begin, k - begin, n) & (other >= begin) & (other < end)
    else:
        return allow(q, k, n)


@jit
def hide(s, q, k, begin, end, keep_ptr, S, n, allow: tl.constexpr, PACKED: tl.constexpr,
         KEEP: tl.constexpr, MASKED: tl.constexpr):
    """Scores of query positions q and key positions k, -inf where hidden. keep_ptr: the
    attention_mask, if there is one (KEEP)."""
    if KEEP:
        kept = tl.load(keep_ptr + k, mask=k < S, other=0) != 0
        s = tl.where(kept[None, :], s, float("-inf"))
    if MASKED:
        seen = ask(allow, q[:, None], k[None, :], n, begin, end, k[None, :], PACKED)
        s = tl.where(seen & (k < S)[None, :], s, float("-inf"))
    return s


# ---------------------------------------------------------------------------------- forward

@jit
def fold(acc, m, l, q, offs_q, begin, end, k_ptr, v_ptr, keep_ptr, k_t, v_t, S, n, scale,
         first, count, front, gap, allow: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr,
         BLOCK_D: tl.constexpr, PACKED: tl.constexpr, KEEP: tl.constexpr, MASKED: tl.constexpr):
    """Walk over `count` key tiles from `first` on, leaving out `gap` tiles after `front`.

    One turn of the loop is the opening's formulas on one tile. m and l (BLOCK_M), acc (BLOCK_M,
    BLOCK_D) are of the tiles so far; scale is log₂e / √D, as exp2 stands for exp."""
    offs_n, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    for i in range(count):
        row = (first + i + tl.where(i >= front, gap, 0)) * BLOCK_N
        k = load_rows(k_ptr, row, k_t, offs_n, offs_d, S, D, BLOCK_D, MASKED)   # (BLOCK_N, D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")                      # (BLOCK_M, BLOCK_N)
        s = hide(s, offs_q, row + offs_n, begin, end, keep_ptr, S, n, allow, PACKED, KEEP, MASKED)
        higher = tl.maximum(m, tl.max(s, 1) * scale)                    # m' = max(m, max s)
        p = tl.exp2(s * scale - higher[:, None])                        # p = exp(s - m')
        alpha = tl.exp2(m - higher)                                     # α = exp(m - m')
        l = l * alpha + tl.sum(p, 1)                                    # l ← α l + Σ p
        v = load_rows(v_ptr, row, v_t, offs_n, offs_d, S, D, BLOCK_D, MASKED)
        # acc ← α acc + p v
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
        m = higher
    return acc, m, l


@sized
def forward_kernel(q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, keep_ptr, begin_ptr, end_ptr, scale,
                   T, S, n, start, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
                   allow: tl.constexpr, keys: tl.constexpr, queries: tl.constexpr,
                   G: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
                   PACKED: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr,
                   STEP: tl.constexpr):
    """One program (a GPU runs many side by side): BLOCK queries of one head; it walks over keys in
    steps of STEP."""
    tiles = tl.cdiv(T, BLOCK)
    head, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    lo = (tiles - 1 - tile) * BLOCK                 # under causal the last tiles have most to do
    b, h = (head // (G * GROUP)).to(tl.int64), head % (G * GROUP)
    q_ptr += b * q_b * 8 + h * q_h * 8
    k_ptr += b * k_b * 8 + h // GROUP * k_h * 8
    v_ptr += b * v_b * 8 + h // GROUP * v_h * 8
    offs_m, offs_d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    rows, inside = lo + offs_m, (lo + offs_m < T)
    if PACKED:
        begin_ptr += b * T
        end_ptr += b * T
    begin, end = own_document(begin_ptr, end_ptr, rows, T, PACKED)
    if KEEP:
        keep_ptr += b * S
    q = load_rows(q_ptr, lo, q_t * 8, offs_m, offs_d, T, D, BLOCK_D, True)
    first, last, inner, outer = walk(keys, start + lo, start + tl.minimum(lo + BLOCK, T), S, 0, n,
                                     begin_ptr, end_ptr, PACKED, STEP)
    acc = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    # -1e30 stands for -infinity: -1e30 + 1e30 is 0, inf - inf is NaN
    m = tl.full((BLOCK,), -1e30, tl.float32)
    l = tl.zeros((BLOCK,), tl.float32)
    # tiles that every row sees whole, then the tiles on the edges
    acc, m, l = fold(acc, m, l, q, start + rows, begin, end, k_ptr, v_ptr, keep_ptr,
                     k_t * 8, v_t * 8, S, n, scale, inner, outer - inner, 0, 0,
                     allow, D, STEP, BLOCK_D, PACKED, KEEP, False)
    acc, m, l = fold(acc, m, l, q, start + rows, begin, end, k_ptr, v_ptr, keep_ptr,
                     k_t * 8, v_t * 8, S, n, scale, first, last - first - (outer - inner),
                     inner - first, outer - inner,
                     allow, D, STEP, BLOCK_D, PACKED, KEEP, True)
    sees = l > 0
    l = tl.where(sees, l, 1.)
    tl.store(lse_ptr + head.to(tl.int64) * T + rows, tl.where(sees, m + tl.log2(l), 1e30),
             mask=inside)
    out_ptr += ((b * T + lo) * (G * GROUP) + h) * D
    tl.store(out_ptr + offs_m[:, None] * (G * GROUP * D) + offs_d[None, :],
             (acc / l[:, None]).to(out_ptr.dtype.element_ty),
             mask=inside[:, None] & (offs_d < D)[None, :])


# --------------------------------------------------------------------------------- backward
#
#   out_i = Σ_j p_ij v_j        p_ij = exp(s_ij - lse_i)        s_ij = q_i · k_j / √D
#
#   dv_j  = Σ_i p_ij do_i                            out is linear in v
#   dp_ij = do_i · v_j
#   ds_ij = p_ij (dp_ij - Σ_m p_im dp_im)            softmax: ∂p_ij/∂s_im = p_ij (1[j=m] - p_im)
#         = p_ij (dp_ij - Δ_i),   Δ_i = do_i · out_i   the sum is do_i · Σ_m p_im v_m
#   dq_i  = Σ_j ds_ij k_j / √D          dk_j = Σ_i ds_ij q_i / √D
#
# Sums over j want queries to stay and keys to walk, sums over i the other way round: two kernels.
# Each computes s, p and dp for itself, from what forward has kept: 7 matrix products a tile in all,
# where one kernel for both would need 5. Each sum is added up by one program in one order, query
# heads of a group included: no atomics, the same bits in every run.

@jit
def fold_dq(dq, q, do, lse, delta, offs_q, begin, end, k_ptr, v_ptr, keep_ptr, k_t, v_t, S, n,
            scale, first, count, front, gap, allow: tl.constexpr, D: tl.constexpr,
            BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PACKED: tl.constexpr,
            KEEP: tl.constexpr, MASKED: tl.constexpr):
    """dq of a tile of queries: adds ds k of `count` key tiles. Walks as `fold` does; p needs no
    correction here, lse is known."""
    offs_n, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    for i in range(count):
        row = (first + i + tl.where(i >= front, gap, 0)) * BLOCK_N
        k = load_rows(k_ptr, row, k_t, offs_n, offs_d, S, D, BLOCK_D, MASKED)
        v = load_rows(v_ptr, row, v_t, offs_n, offs_d, S, D, BLOCK_D, MASKED)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        s = hide(s, offs_q, row + offs_n, begin, end, keep_ptr, S, n, allow, PACKED, KEEP, MASKED)
        p = tl.exp2(s * scale - lse[:, None])
        ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@sized
def dq_kernel(q_ptr, k_ptr, v_ptr, out_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, keep_ptr,
              begin_ptr, end_ptr, scale, T, S, n, start,
              q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
              allow: tl.constexpr, keys: tl.constexpr, queries: tl.constexpr,
              G: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
              PACKED: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """One program: dq of BLOCK queries of one head. Leaves Δ behind for the kernel below."""
    tiles = tl.cdiv(T, BLOCK)
    head, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    lo = (tiles - 1 - tile) * BLOCK
    b, h = (head // (G * GROUP)).to(tl.int64), head % (G * GROUP)
    q_ptr += b * q_b * 8 + h * q_h * 8
    k_ptr += b * k_b * 8 + h // GROUP * k_h * 8
    v_ptr += b * v_b * 8 + h // GROUP * v_h * 8
    offs_m, offs_d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    rows, inside = lo + offs_m, (lo + offs_m < T)
    if PACKED:
        begin_ptr += b * T
        end_ptr += b * T
    begin, end = own_document(begin_ptr, end_ptr, rows, T, PACKED)
    if KEEP:
        keep_ptr += b * S
    q = load_rows(q_ptr, lo, q_t * 8, offs_m, offs_d, T, D, BLOCK_D, True)
    row_t = G * GROUP * D                                       # out, do, dq: rows (T, H, D)
    do_ptr += (b * T * (G * GROUP) + h) * D
    out_ptr += (b * T * (G * GROUP) + h) * D
    do = load_rows(do_ptr, lo, row_t, offs_m, offs_d, T, D, BLOCK_D, True)
    out = load_rows(out_ptr, lo, row_t, offs_m, offs_d, T, D, BLOCK_D, True)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    at = head.to(tl.int64) * T + rows                           # lse, Δ: (B, H, T)
    tl.store(delta_ptr + at, delta, mask=inside)
    lse = tl.load(lse_ptr + at, mask=inside, other=0.)
    first, last, inner, outer = walk(keys, start + lo, start + tl.minimum(lo + BLOCK, T), S, 0, n,
                                     begin_ptr, end_ptr, PACKED, STEP)
    dq = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    dq = fold_dq(dq, q, do, lse, delta, start + rows, begin, end, k_ptr, v_ptr, keep_ptr,
                 k_t * 8, v_t * 8, S, n, scale, inner, outer - inner, 0, 0,
                 allow, D, STEP, BLOCK_D, PACKED, KEEP, False)
    dq = fold_dq(dq, q, do, lse, delta, start + rows, begin, end, k_ptr, v_ptr, keep_ptr,
                 k_t * 8, v_t * 8, S, n, scale, first, last - first - (outer - inner),
                 inner - first, outer - inner, allow, D, STEP, BLOCK_D, PACKED, KEEP, True)
    dq_ptr += ((b * T + lo) * (G * GROUP) + h) * D
    tl.store(dq_ptr + offs_m[:, None] * row_t + offs_d[None, :],
             (dq * (scale * 0.6931471805599453)).to(dq_ptr.dtype.element_ty),
             mask=inside[:, None] & (offs_d < D)[None, :])


@jit
def fold_dkv(dk, dv, k, v, offs_k, begin, end, q_ptr, do_ptr, lse_ptr, delta_ptr, q_t, do_t, T, n,
             start, scale, first, count, front, gap, allow: tl.constexpr, D: tl.constexpr,
             BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, PACKED: tl.constexpr,
             MASKED: tl.constexpr):
    """dk and dv of a tile of keys: adds dsᵀ q and pᵀ do of `count` query tiles. Scores are
    transposed here: rows are keys, columns are queries."""
    offs_m, offs_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    for i in range(count):
        row = (first + i + tl.where(i >= front, gap, 0)) * BLOCK_M
        q = load_rows(q_ptr, row, q_t, offs_m, offs_d, T, D, BLOCK_D, MASKED)
        do = load_rows(do_ptr, row, do_t, offs_m, offs_d, T, D, BLOCK_D, MASKED)
        rows = row + offs_m
        if MASKED:
            lse = tl.load(lse_ptr + rows, mask=rows < T, other=0.)
            delta = tl.load(delta_ptr + rows, mask=rows < T, other=0.)
        else:
            lse, delta = tl.load(lse_ptr + rows), tl.load(delta_ptr + rows)
        # dp first: with s first, Triton 3.7.1 spills in this loop (sm_90, D 128: 3 spills)
        dp = tl.dot(v, tl.trans(do), input_precision="ieee")    # (BLOCK_N, BLOCK_M): transposed
        s = tl.dot(k, tl.trans(q), input_precision="ieee")
        if MASKED:
            at = start + rows[None, :]
            seen = ask(allow, at, offs_k[:, None], n, begin, end, at, PACKED)
            s = tl.where(seen & (rows < T)[None, :], s, float("-inf"))
        p = tl.exp2(s * scale - lse[None, :])
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@sized
def dkv_kernel(q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, keep_ptr,
               begin_ptr, end_ptr, scale, T, S, n, start,
               q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
               allow: tl.constexpr, keys: tl.constexpr, queries: tl.constexpr,
               G: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
               PACKED: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """One program: dk and dv of BLOCK keys of one key head, over all query heads that read it."""
    tiles = tl.cdiv(S, BLOCK)
    head, lo = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BLOCK
    b, g = (head // G).to(tl.int64), head % G
    k_ptr += b * k_b * 8 + g * k_h * 8
    v_ptr += b * v_b * 8 + g * v_h * 8
    offs_n, offs_d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    columns, inside = lo + offs_n, (lo + offs_n < S)
    if PACKED:
        begin_ptr += b * S
        end_ptr += b * S
    begin, end = own_document(begin_ptr, end_ptr, columns, S, PACKED)
    k = load_rows(k_ptr, lo, k_t * 8, offs_n, offs_d, S, D, BLOCK_D, True)
    v = load_rows(v_ptr, lo, v_t * 8, offs_n, offs_d, S, D, BLOCK_D, True)
    first, last, inner, outer = walk(queries, lo, tl.minimum(lo + BLOCK, S), start + T, start, n,
                                     begin_ptr, end_ptr, PACKED, STEP)
    dk = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for h in range(g * GROUP, g * GROUP + GROUP):
        head_q = q_ptr + b * q_b * 8 + h * q_h * 8
        head_do = do_ptr + (b * T * (G * GROUP) + h) * D
        at = (b * (G * GROUP) + h) * T
        dk, dv = fold_dkv(dk, dv, k, v, columns, begin, end, head_q, head_do, lse_ptr + at,
                          delta_ptr + at, q_t * 8, G * GROUP * D, T, n, start, scale,
                          inner, outer - inner, 0, 0, allow, D, STEP, BLOCK_D, PACKED, False)
        dk, dv = fold_dkv(dk, dv, k, v, columns, begin, end, head_q, head_do, lse_ptr + at,
                          delta_ptr + at, q_t * 8, G * GROUP * D, T, n, start, scale,
                          first, last - first - (outer - inner), inner - first, outer - inner,
                          allow, D, STEP, BLOCK_D, PACKED, True)
    dk *= scale * 0.6931471805599453                # scale is log₂e / √D
    if KEEP:        # fold_dkv does not read the mask: at padding dk and dv are wrong, and become 0
        kept = (tl.load(keep_ptr + b * S + columns, mask=inside, other=0) != 0)[:, None]
        dk, dv = tl.where(kept, dk, 0.), tl.where(kept, dv, 0.)
    at = ((b * S + lo) * G + g) * D + offs_n[:, None] * (G * D) + offs_d[None, :]
    there = inside[:, None] & (offs_d < D)[None, :]
    tl.store(dk_ptr + at, dk.to(dk_ptr.dtype.element_ty), mask=there)
    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=there)


# ----------------------------------------------------------------------------------- launch

@functools.cache
def on_device(rule):
    """The rule as the kernel calls it. The interpreter runs plain functions, and only those."""
    if rule.__name__ == "<lambda>":
        raise ValueError("attention: a lambda cannot be compiled; write the rule with def")
    return rule if INTERPRET else triton.jit(rule)


@functools.lru_cache(maxsize=1024)
def all_rows_see(allow, T, S, n, start):
    """Does the rule let every row see a key? Asked once per rule and shape, in blocks of rows."""
    return all(bool(visible(allow, min(1024, T - i), S, n, start + i).any(1).all())
               for i in range(0, T, 1024))


def in_eights(name, t):
    """Strides of batch, length and heads in units of 8 elements."""
    strides = [0 if size == 1 else step for size, step in zip(t.shape, t.stride())]
    if strides[3] > 1 or any(step % 8 for step in strides[:3]):
        raise ValueError(f"attention: strides {t.stride()} of {name}; the last must be 1 and the "
                         "others multiples of 8 (.contiguous() makes them so)")
    return [step // 8 for step in strides[:3]]


def check(q, k, v, allow, n, start, attention_mask, doc_spans):
    """Refuse what the kernel would answer wrongly. The values of `attention_mask` and `doc_spans`
    are not read: that would wait for the GPU. A row that sees nothing because of them is 0."""
    (B, T, H, D), S = q.shape, k.shape[1]
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"attention: {q.dtype}; the kernel takes float16, bfloat16, float32")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}: must be alike")
    if D % 8 or not 0 < D <= 128:
        raise ValueError(f"attention: head size {D}; the kernel takes multiples of 8 up to 128")
    for name, t in (("q", q), ("k", k), ("v", v)):
        in_eights(name, t)
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        raise ValueError(f"attention: attention_mask is {attention_mask.dtype}, must be bool")
    if doc_spans is not None and doc_spans.dtype != torch.int32:
        raise ValueError(f"attention: doc_spans is {doc_spans.dtype}, must be int32: see "
                         "document_spans()")
    if not all_rows_see(allow, T, S, n, start):
        raise ValueError(f"attention: {allow.__name__} hides every one of {S} keys from some of "
                         f"{T} queries at {start}; every row must see a key")


def tiles(kernel, q):
    """BLOCK, STEP, warps, stages of this kernel for q's head size and q's GPU."""
    if INTERPRET:
        return SMALL
    size = 64 if q.shape[3] <= 64 else 128
    if q.dtype == torch.float32:
        return FLOAT_TILES[size][kernel]
    hopper = torch.cuda.get_device_capability(q.device)[0] == 9
    return TILES[90 if hopper else 80, size][kernel]


def launch(kernel, name, rows, heads, tensors, q, k, v, allow, n, start, attention_mask, doc_spans):
    """What the three launches have in common. `rows` are cut in blocks, one program a block."""
    (B, T, H, D), (S, G) = q.shape, k.shape[1:3]
    block, step, warps, stages = tiles(name, q)
    begin, end = (None, None) if doc_spans is None else doc_spans.contiguous()
    attention_mask = None if attention_mask is None else attention_mask.contiguous()
    keys, queries = (getattr(allow, side, anywhere) for side in ("keys", "queries"))
    kernel[(-(-rows // block) * B * heads,)](
        q, k, v, *tensors, attention_mask, begin, end, math.log2(math.e) / math.sqrt(D),
        T, S, n, start,
        *in_eights("q", q), *in_eights("k", k), *in_eights("v", v),
        on_device(allow), on_device(keys), on_device(queries), G, H // G, D,
        64 if D <= 64 else 128, doc_spans is not None, attention_mask is not None, block, step,
        num_warps=warps, num_stages=stages, enable_fp_fusion=True)


class Attention(torch.autograd.Function):
    """Keeps q, k, v, out and one number a row, lse; backward computes the probabilities again."""

    @staticmethod
    def forward(ctx, q, k, v, allow, n, start, attention_mask, doc_spans):
        B, T, H, D = q.shape
        out, lse = q.new_empty(B, T, H, D), q.new_empty((B, H, T), dtype=torch.float32)
        if out.numel():
            launch(forward_kernel, "forward", T, H, (out, lse), q, k, v, allow, n, start,
                   attention_mask, doc_spans)
        ctx.save_for_backward(q, k, v, out, lse, attention_mask, doc_spans)
        ctx.rule = allow, n, start
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        q, k, v, out, lse, *data = ctx.saved_tensors
        (B, T, H, D), (S, G), mask = q.shape, k.shape[1:3], (*ctx.rule, *data)
        sizes = (B, T, H, D), (B, S, G, D), (B, S, G, D)
        if not out.numel():                 # no queries: nothing is launched, gradients are 0
            return *(q.new_zeros(size) for size in sizes), *[None] * 5
        dq, dk, dv = (q.new_empty(size) for size in sizes)     # the kernels write every number
        dout, delta = dout.contiguous(), torch.empty_like(lse)
        launch(dq_kernel, "dq", T, H, (out, dout, lse, delta, dq), q, k, v, *mask)
        launch(dkv_kernel, "dkv", S, G, (dout, lse, delta, dk, dv), q, k, v, *mask)
        return dq, dk, dv, *[None] * 5


def attention(q, k, v, allow=causal, n=0, start=0, attention_mask=None, doc_spans=None):
    """Attention of queries at positions start .. start+T-1 to keys at positions 0 .. S-1.

    q (B, T, H, D); k, v (B, S, G, D); attention_mask (B, S) bool, False where a key is padding;
    doc_spans (2, B, S) from document_spans. Returns (B, T, H, D) in q's dtype. A row that sees no
    key (padding looking at padding) gets the mean of the values, or 0 from the kernel, instead of
    NaN; nobody reads it."""
    B, T, H, D = q.shape if q.dim() == 4 else (0, 0, 0, 0)
    S, G = k.shape[1:3] if k.dim() == 4 else (0, 0)
    if k.shape != v.shape or k.shape != (B, S, G, D) or not G or H % G:
        raise ValueError(f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} "
                         "do not fit: q must be (B, T, H, D), k and v (B, S, G, D), H a multiple "
                         "of G")
    if attention_mask is not None and attention_mask.shape != (B, S):
        raise ValueError(f"attention: attention_mask {tuple(attention_mask.shape)}, must be (B, S) "
                         f"= {B, S}")
    if doc_spans is not None and (doc_spans.shape != (2, B, S) or T != S or start):
        raise ValueError(f"attention: doc_spans {tuple(doc_spans.shape)}, {T} queries from {start} "
                         f"on; packed rows need (2, B, S) = {2, B, S}, T = S, start = 0")
    if not fused(q, k, v, attention_mask, doc_spans):
        return reference(q, k, v, allow, n, start, attention_mask, doc_spans)
    if q.numel():
        check(q, k, v, allow, n, start, attention_mask, doc_spans)
    return Attention.apply(q, k, v, allow, n, start, attention_mask, doc_spans)


def compile_cases():
    """Every kernel at its shipped tiles, for a compiler without a GPU; "sm" is the GPU's."""
    types = {f"{name}_ptr": "*bf16" for name in "q k v out do dq dk dv".split()}
    types |= {"lse_ptr": "*fp32", "delta_ptr": "*fp32", "keep_ptr": "*i1", "begin_ptr": "*i32",
              "end_ptr": "*i32"}
    cases = []
    for (sm, d), table in TILES.items():
        shapes = ((64, full, False), (64, causal, True)) if d == 64 else (
            (88, full, False), (128, causal, True), (128, sliding_window, True))
        for kernel, name in ((forward_kernel, "forward"), (dq_kernel, "dq"), (dkv_kernel, "dkv")):
            block, step, warps, stages = table[name]
            for D, rule, data in shapes:
                constants = {"allow": on_device(rule), "keys": on_device(rule.keys),
                             "queries": on_device(rule.queries), "G": 8, "GROUP": 4 if data else 1,
                             "D": D, "BLOCK_D": d, "PACKED": data, "KEEP": data, "BLOCK": block,
                             "STEP": step}
                if not data:
                    constants |= {"keep_ptr": None, "begin_ptr": None, "end_ptr": None}
                signature = {a: "constexpr" if a in constants else types.get(a, "i32")
                             for a in kernel.arg_names} | {"scale": "fp32"}
                cases.append({
                    "name": f"attention.{name} sm_{sm} D={D} {rule.__name__}"
                            f"{' packed, attention_mask, GQA' if data else ''}",
                    "sm": sm, "kernel": kernel, "signature": signature, "constexprs": constants,
                    "divisible": set(types) & set(signature) - set(constants),
                    "num_warps": warps, "num_stages": stages, "dot": True,
                    # Triton 3.6 loads lse and delta, one number a row, in the matrix product's
                    # layout, 4 bytes at a time and once in every thread; q, k, v, do stay wide
                    **({"wide": .25} if name == "dkv" else {})})
    return cases + float_cases(cases)


def float_cases(cases):
    """The backward kernels in fp32: their products are multiply-adds, whose loop must not spill."""
    found = []
    for case in cases:
        kernel = case["name"].split()[0].removeprefix("attention.")
        if kernel != "forward" and "D=128 causal" in case["name"]:
            block, step, warps, stages = FLOAT_TILES[128][kernel]
            kinds = {name: "*fp32" if kind == "*bf16" else kind
                     for name, kind in case["signature"].items()}
            found.append({**case, "name": case["name"] + ", fp32", "signature": kinds,
                          "constexprs": {**case["constexprs"], "BLOCK": block, "STEP": step},
                          "num_warps": warps, "num_stages": stages, "dot": False, "hot": "FFMA",
                          "wide": .25})
    return found


def report(device, T=577, H=4, D=64):
    """Relative errors against double precision of the specification, and of the kernel on CUDA."""
    for rule in (causal, full):
        leaves = [torch.randn(1, T, H, D, device=device, dtype=torch.double, requires_grad=True)
                  for _ in "qkv"]
        scores = torch.einsum("bihd,bjhd->bhij", *leaves[:2]) * D ** -0.5
        p = scores.masked_fill(~visible(rule, T, T, device=device), -torch.inf).softmax(-1)
        exact = torch.einsum("bhij,bjhd->bihd", p, leaves[2])
        dout = torch.randn_like(exact)
        exact = exact, *torch.autograd.grad(exact, leaves, dout)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            q, k, v = (t.detach().to(dtype).requires_grad_() for t in leaves)
            paths = {"spec": lambda: reference(q, k, v, rule, 0, 0, None, None)}
            if fused(q.float()):
                paths["kernel"] = lambda: attention(q, k, v, rule)
            for name, path in paths.items():
                out = path()
                got = out, *torch.autograd.grad(out, (q, k, v), dout.to(dtype))
                errors = [float((a.double() - b).detach().norm() / b.detach().norm())
                          for a, b in zip(got, exact)]
                print(f"{rule.__name__:7}{str(dtype)[6:]:9}{name:7}",
                      "  ".join(f"{x} {e:.1e}" for x, e in zip(("out", "dq", "dk", "dv"), errors)))


def timings():
    """Milliseconds forward + backward beside PyTorch's fused operation."""
    for B, T, H, D, rule in ((16, 577, 16, 64, full), (4, 2048, 32, 128, causal)):
        q, k, v = (torch.randn(B, T, H, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
                   for _ in "qkv")
        dout = torch.randn_like(q)
        for name, run in (("kernel", lambda: attention(q, k, v, rule)),
                          ("PyTorch", lambda: F.scaled_dot_product_attention(
                              *(t.transpose(1, 2) for t in (q, k, v)), is_causal=rule is causal
                              ).transpose(1, 2))):
            ms = triton.testing.do_bench(lambda: torch.autograd.grad(run(), (q, k, v), dout))
            print(f"B {B} T {T} H {H} D {D} {rule.__name__} {name}: {ms:.2f} ms")


if __name__ == "__main__":
    for rule in (causal, full):
        print(rule.__name__)
        for row in visible(rule, 5, 5).tolist():
            print("   " + " ".join(".#"[seen] for seen in row))
    if torch.cuda.is_available():
        report("cuda")
        timings()
    else:
        report("cpu", T=128)
        print("No GPU here: the kernel was not run.")
