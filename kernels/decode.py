"""kernels/decode.py: one query against a long cache, read once and by the whole GPU.

While a text is written, every layer asks the cache one question per token:

    s = q kᵀ / √D,   p = softmax(s),   o = p v          q (H, D); k, v (S, G, D)

That is two operations per number of the cache: the time is that of reading it. For Llama-2-7B
(G = 32, D = 128, bf16) at S = 4,096 one layer holds 2 · 4,096 · 32 · 128 · 2 bytes = 67 MB, and
all 32 layers 2.1 GB, beside 13.5 GB of weights. What a product, a softmax and a product add, each
writing for the next, is small (scores: 32 · 4,096 · 4 bytes, five times over, 2.6 MB), but:

    who reads   the kernel for training gives each head to one program: 32 programs, 132
                multiprocessors. Here the cache of one head is cut into chunks, a program each.
    grouped     H / G query heads share a key head [GQA] 2305.13245. Written out in PyTorch, the
                cache is copied H / G times first; here a program holds the H / G queries and
                reads its keys once.
    ragged      rows of a batch have different lengths. A chunk behind a row's end reads nothing.
    window      a model with a sliding window sees its last n keys. A chunk before them reads
                nothing, either. The rule is attention.py's, asked for the newest position.

A chunk c gives its own normalised answer oᶜ and Lᶜ = log₂ Σ 2^s over its keys. Softmax over the
union weighs the answers by what each chunk summed ([Flash-Decoding], Dao et al. 2023):

    o = Σ_c 2^(Lᶜ - L) oᶜ,    L = log₂ Σ_c 2^Lᶜ

    two chunks, scores (base 2) 0 1 | 3:   L = log₂ 3, 3;   weights 3/11, 8/11: 1+2 and 8 of 11

The order of the sum is fixed: the same bits from run to run. Scores, sums and the merge are fp32;
p is rounded to v's dtype before it meets v, as in attention.py. Nothing is kept for a backward:
nobody differentiates a text being written.

The cache is llama.Cache's (B, capacity, G, D), of which k and v show the first S places. The
kernel gets G and D as constants and the capacity in rows, so the compiler sees by itself that every
row of every head starts at a multiple of 8 numbers, and loads 128 bits at a time. With strides as
plain numbers it cannot know, and the same kernel loads two bytes at a time.

On a CPU the cache is read by PyTorch's own fused attention, the queries of a group as the rows of
one small square, so that no key is copied.

Alone: `python -m kernels.decode` prints errors against fp64 and, on a GPU, times.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F

from kernels.attention import causal, on_device, sliding_window
from kernels.launch import fused, INTERPRET, jit, SPEC, tl, triton

# ---- the specification ----

def decode_spec(q, k, v, attention_mask=None, lengths=None, allow=causal, n=0):
    """q (B, 1, H, D); k, v (B, S, G, D) -> (B, 1, H, D), in the dtype of q."""
    B, _, H, D = q.shape
    S, G = k.shape[1:3]
    end = torch.full((B,), S, device=q.device) if lengths is None else lengths
    seen = allow(end[:, None] - 1, torch.arange(S, device=q.device), n)             # (B, S)
    if attention_mask is not None:
        seen = seen & attention_mask
    v = v.masked_fill(~seen[:, :, None, None], 0)     # unwritten cache: 0 · NaN would be NaN
    q = q.reshape(B, G, H // G, D) * D ** -0.5
    scores = torch.einsum("bghd,bsgd->bghs", q, k).masked_fill(~seen[:, None, None], -math.inf)
    p = scores.softmax(-1, torch.promote_types(q.dtype, torch.float32)).to(v.dtype)
    return torch.einsum("bghs,bsgd->bghd", p, v).reshape(B, 1, H, D)


def decode_fused(q, k, v, seen=None):
    """The same by PyTorch's fused attention; seen (B, S) bool or None."""
    B, _, H, D = q.shape
    G, wide = k.shape[2], torch.promote_types(q.dtype, torch.float32)
    # 16 bits are widened first: for one query PyTorch's bf16 takes 1.4 to 7 times as long (one core
    # of an EPYC; at D 64, S 290 and 12 heads 835 µs, so 145)
    o = F.scaled_dot_product_attention(q.reshape(B, G, H // G, D).to(wide),
                                       k.transpose(1, 2).to(wide), v.transpose(1, 2).to(wide),
                                       None if seen is None else seen[:, None, None])
    return o.reshape(B, 1, H, D).to(q.dtype)


# ---- the kernels ----

def sized(kernel):
    """triton.jit that compiles once for all lengths, not again for each multiple of 16."""
    sizes = ("capacity", "keep_stride", "length", "n", "chunk")
    return triton.jit(kernel, do_not_specialize=sizes) if triton else kernel


@sized
def decode_chunk(q_ptr, k_ptr, v_ptr, keep_ptr, lengths_ptr, part_ptr, lse_ptr,
                 capacity, keep_stride, length, n, chunk, scale,
                 allow: tl.constexpr, keys: tl.constexpr, H: tl.constexpr, G: tl.constexpr,
                 D: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """One chunk of one key head's cache: its answer, and the log₂ of what it summed."""
    split, group, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    GROUP: tl.constexpr = H // G
    # a matrix instruction takes at least 16 rows; the rows behind GROUP are zeros, and free:
    # the time is the cache's
    offs_r, offs_n, offs_d = tl.arange(0, ROWS), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    head = batch * H + group * GROUP + offs_r
    real = offs_r < GROUP
    q = tl.load(q_ptr + head[:, None] * D + offs_d[None, :],
                mask=real[:, None] & (offs_d < D)[None, :], other=0.)          # (ROWS, BLOCK_D)
    end = length
    if lengths_ptr is not None:
        end = tl.minimum(end, tl.load(lengths_ptr + batch))
    first, last, _, _ = keys(end - 1, end, n, end)
    first, last = tl.maximum(first, split * chunk), tl.minimum(last, split * chunk + chunk)
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    l = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    tile = offs_n[:, None] * (G * D) + offs_d[None, :]
    for j in range(first, last, BLOCK_N):
        # in 64 bits: a batch of long caches holds more than 2³¹ numbers
        row = (batch.to(tl.int64) * capacity + j) * (G * D) + group * D
        seen = allow(end - 1, j + offs_n, n) & (j + offs_n < last)
        inside = seen[:, None] & (offs_d < D)[None, :]
        k = tl.load(k_ptr + row + tile, mask=inside, other=0.)                 # (BLOCK_N, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale             # (ROWS, BLOCK_N)
        if keep_ptr is not None:
            seen = seen & (tl.load(keep_ptr + batch * keep_stride + j + offs_n, mask=seen,
                                   other=0) != 0)
        s = tl.where(seen[None, :], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        safe = tl.where(m_new == float("-inf"), 0., m_new)     # all padding so far: -inf - -inf
        p = tl.exp2(s - safe[:, None])
        shrink = tl.exp2(m - safe)
        v = tl.load(v_ptr + row + tile, mask=inside, other=0.)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        l = l * shrink + tl.sum(p, 1)
        m = m_new
    at = head * tl.num_programs(0) + split                     # (B, H, splits)
    whole = tl.where(l > 0, l, 1.)
    tl.store(part_ptr + at[:, None] * D + offs_d[None, :], acc / whole[:, None],
             mask=real[:, None] & (offs_d < D)[None, :])
    tl.store(lse_ptr + at, tl.where(l > 0, m + tl.log2(whole), float("-inf")), mask=real)


@jit
def decode_merge(part_ptr, lse_ptr, out_ptr, splits,
                 D: tl.constexpr, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr):
    """o = Σ 2^(Lᶜ - L) oᶜ for one query head of one row."""
    head = tl.program_id(0)
    offs_s, offs_d = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    lse = tl.load(lse_ptr + head * splits + offs_s, mask=offs_s < splits, other=float("-inf"))
    top = tl.max(lse, 0)
    weight = tl.exp2(lse - tl.where(top == float("-inf"), 0., top))
    part = tl.load(part_ptr + (head * splits + offs_s)[:, None] * D + offs_d[None, :],
                   mask=(offs_s < splits)[:, None] & (offs_d < D)[None, :], other=0.)
    total = tl.sum(weight, 0)
    o = tl.sum(part * weight[:, None], 0) / tl.where(total > 0, total, 1.)     # (BLOCK_D,)
    tl.store(out_ptr + head * D + offs_d, o.to(out_ptr.dtype.element_ty), mask=offs_d < D)


def tiles(group, dim, size):
    """Tile sizes for `group` query heads a key head, head size dim, numbers of `size` bytes."""
    return {"ROWS": max(16, triton.next_power_of_2(group)), "BLOCK_N": 64 if size == 2 else 32,
            "BLOCK_D": max(16, triton.next_power_of_2(dim))}


# ---- the public function ----

@functools.cache
def processors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count


def check(q, k, v, attention_mask, lengths, kernel=True, allow=causal, n=0):
    """ValueError unless the kernel can run; nothing here waits for the GPU."""
    B, T, H, D = q.shape if q.dim() == 4 else (0, 0, 0, 0)
    S, G = k.shape[1:3] if k.dim() == 4 else (0, 0)
    if T != 1 or k.shape != v.shape or k.shape != (B, S, G, D) or not G or H % G or not S:
        raise ValueError(f"decode: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; it "
                         "takes q (B, 1, H, D), k and v (B, S, G, D), S > 0, H a multiple of G")
    if kernel and (D % 8 or not 8 <= D <= 128):
        raise ValueError(f"decode: head size {D}; it takes multiples of 8 from 8 to 128")
    if not q.dtype == k.dtype == v.dtype or kernel and q.dtype not in (
            torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"decode: q {q.dtype}, k {k.dtype}, v {v.dtype}; it takes float32, "
                         "float16 or bfloat16, the same for all")
    if k.stride() != v.stride() or k.stride()[1:] != (G * D, D, 1) or (
            B > 1 and k.stride(0) % (G * D)):
        raise ValueError(f"decode: strides k {k.stride()}, v {v.stride()}; it takes the first "
                         "places of a contiguous (B, capacity, G, D)")
    if attention_mask is not None and (
            attention_mask.shape != (B, S) or attention_mask.dtype != torch.bool
            or S > 1 and attention_mask.stride(1) != 1):
        raise ValueError(f"decode: attention_mask {attention_mask.dtype} "
                         f"{tuple(attention_mask.shape)}; it takes bool {(B, S)}, rows without "
                         "gaps")
    if lengths is not None and (lengths.shape != (B,) or lengths.dtype != torch.int32
                                or not lengths.is_contiguous()):
        raise ValueError(f"decode: lengths {lengths.dtype} {tuple(lengths.shape)}; it takes int32 "
                         f"{(B,)}")
    if allow not in (causal, sliding_window) or allow is sliding_window and n < 1:
        raise ValueError(f"decode: rule {allow.__name__} with n = {n}; it takes causal, or "
                         "sliding_window with n from 1 on")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        raise ValueError("decode: gradients are wanted and it has none; use attention, or "
                         "torch.no_grad")
    # on a GPU the answer would cost a wait for it
    if q.device.type == "cpu" and (attention_mask is not None or lengths is not None):
        end = torch.full((B,), S) if lengths is None else lengths
        seen = allow(end[:, None] - 1, torch.arange(S), n)
        seen = seen if attention_mask is None else seen & attention_mask
        blind = (~seen.any(1)).nonzero()[:, 0].tolist()
        if blind:
            raise ValueError(f"decode: rows {blind} see no key; each row must see one at least")


def decode(q, k, v, attention_mask=None, lengths=None, splits=None, allow=causal, n=0):
    """Attention of the newest token to everything in the cache.

    q (B, 1, H, D); k, v (B, S, G, D), the first S places of a cache.
    keep (B, S) bool: False where a key is padding. lengths (B,) int32: row b sees keys
    0 .. lengths[b]-1; with lengths on the device and S the capacity, shapes never change and the
    whole step can live in one CUDA graph.
    splits: programs that share one head's cache; None: enough to fill the GPU.
    allow, n: causal, or sliding_window and how many of these keys each row sees at most.
    Returns (B, 1, H, D) in q's dtype. Every row must see a key. On a CPU that is checked; asking a
    GPU would stall it, and a row that sees nothing gets zeros there."""
    kernel = fused(q, k, v, attention_mask, lengths)          # refuses tensors on different devices
    check(q, k, v, attention_mask, lengths, kernel, allow, n)
    if lengths is None:                     # the host knows where the window begins
        first = max(allow.keys(k.shape[1] - 1, k.shape[1], n, k.shape[1])[0], 0)
        k, v = k[:, first:], v[:, first:]
        if attention_mask is not None:
            attention_mask = attention_mask[:, first:]
    if not kernel and (SPEC or lengths is not None):
        return decode_spec(q, k, v, attention_mask, lengths, allow, n)
    if not kernel:
        return decode_fused(q, k, v, attention_mask)
    B, _, H, D = q.shape
    S, G = k.shape[1:3]
    size = tiles(H // G, D, q.element_size())
    if not B:
        return torch.empty_like(q)
    if splits is None:                      # two programs a multiprocessor hide each other's waits
        # down: one program more than there is room for would wait for a whole round of the others
        splits = 2 * (8 if INTERPRET else processors(q.device)) // (B * G)
    # no more than there are tiles, and no more than the merge holds in registers at once
    splits = max(1, min(splits, triton.cdiv(S, size["BLOCK_N"]), 64))
    chunk = triton.cdiv(triton.cdiv(S, splits), size["BLOCK_N"]) * size["BLOCK_N"]
    splits = triton.cdiv(S, chunk)
    q, out = q.contiguous(), torch.empty(q.shape, dtype=q.dtype, device=q.device)
    part = torch.empty(B, H, splits, D, dtype=torch.float32, device=q.device)
    lse = torch.empty(B, H, splits, dtype=torch.float32, device=q.device)
    decode_chunk[(splits, G, B)](
        q, k, v, attention_mask, lengths, part, lse, k.stride(0) // (G * D),
        0 if attention_mask is None else attention_mask.stride(0), S, n, chunk,
        D ** -0.5 * math.log2(math.e), on_device(allow), on_device(allow.keys), H=H, G=G, D=D,
        **size, num_warps=4, num_stages=3, enable_fp_fusion=True)
    decode_merge[(B * H,)](part, lse, out, splits, D=D, SPLITS=triton.next_power_of_2(splits),
                           BLOCK_D=size["BLOCK_D"], num_warps=4, enable_fp_fusion=True)
    return out


# ---- what tests/test_compile.py compiles ----

def compile_cases():
    """The shipped tiles at the heads of LLaVA-1.5 7B, Mistral-7B and a small LLaMA; no launch."""
    cases = []
    pointers = ("q_ptr", "k_ptr", "v_ptr", "keep_ptr", "lengths_ptr", "part_ptr", "lse_ptr")
    for H, G, D, dtype, padded, rule in (
            (32, 32, 128, "bf16", False, causal), (32, 8, 128, "bf16", True, causal),
            (32, 8, 128, "bf16", True, sliding_window), (32, 4, 64, "fp16", True, causal),
            (25, 5, 88, "bf16", False, causal), (32, 32, 128, "fp32", False, causal)):
        signature = {"q_ptr": f"*{dtype}", "k_ptr": f"*{dtype}", "v_ptr": f"*{dtype}",
                     "part_ptr": "*fp32", "lse_ptr": "*fp32", "capacity": "i32",
                     "keep_stride": "i32", "length": "i32", "n": "i32", "chunk": "i32",
                     "scale": "fp32", "lengths_ptr": "*i32"}
        constexprs = {"allow": on_device(rule), "keys": on_device(rule.keys), "H": H, "G": G,
                      "D": D, **tiles(H // G, D, 4 if dtype == "fp32" else 2)}
        if padded:
            signature["keep_ptr"] = "*i1"
        else:
            constexprs["keep_ptr"] = None
        cases.append({"name": f"decode_chunk H{H} G{G} D{D} {dtype}" + " keep" * padded
                      + " window" * (rule is sliding_window),
                      "kernel": decode_chunk, "signature": signature, "constexprs": constexprs,
                      # the capacity and the length are any numbers: nothing is promised of them
                      "divisible": set(pointers) & set(signature), "num_warps": 4, "num_stages": 3,
                      # 16 rows: wgmma begins at 64, so sm_90 also gets mma.sync; fp32 gets none
                      "dot": "HMMA" if dtype != "fp32" else False})
    for D, splits in ((128, 16), (88, 64)):
        cases.append({"name": f"decode_merge D{D} splits {splits}", "kernel": decode_merge,
                      "signature": {"part_ptr": "*fp32", "lse_ptr": "*fp32", "out_ptr": "*bf16",
                                    "splits": "i32"},
                      "constexprs": {"D": D, "SPLITS": splits, "BLOCK_D": 128},
                      "divisible": {"part_ptr", "lse_ptr", "out_ptr"},
                      "num_warps": 4, "num_stages": 3, "dot": False})
    return cases


if __name__ == "__main__":
    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    torch.manual_seed(0)
    print(f"decode on {torch.cuda.get_device_name() if gpu else 'a CPU: no GPU here'}, {dtype}")
    print(f"{'B':>3}{'S':>7}{'H':>4}{'G':>4}{'D':>5}{'error':>10}{'of spec':>10}"
          + f"{'ms':>9}{'spec':>9}{'sdpa':>9}{'GB/s':>7}" * gpu)
    for B, S, H, G, D in ((1, 1024, 32, 32, 128), (1, 4096, 32, 32, 128), (8, 1024, 32, 8, 128),
                          (2, 577, 8, 2, 64)):
        cache = torch.randn(2, B, S + 64, G, D, device=device, dtype=dtype)
        query = torch.randn(B, 1, H, D, device=device, dtype=dtype)
        keys, values = cache[:, :, :S]
        exact = decode_spec(query.double(), keys.double(), values.double())
        ours, spec = decode(query, keys, values), decode_spec(query, keys, values)
        line = f"{B:3}{S:7}{H:4}{G:4}{D:5}" + "".join(
            f"{float((o - exact).abs().max()):10.1e}" for o in (ours, spec))
        if gpu:
            turned = [t.transpose(1, 2) for t in (query, keys, values)]
            ms = [triton.testing.do_bench(f, return_mode="median") for f in (
                lambda: decode(query, keys, values), lambda: decode_spec(query, keys, values),
                lambda: F.scaled_dot_product_attention(*turned, enable_gqa=H != G))]
            line += "".join(f"{t:9.4f}" for t in ms)
            line += f"{2 * B * S * G * D * dtype.itemsize / ms[0] / 1e6:7.0f}"
        print(line)
