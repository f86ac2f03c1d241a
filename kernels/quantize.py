"""kernels/quantize.py: a few rows times a matrix, at the speed at which the matrix is read.

While a text is written, every weight is read once a token and used once a row:

    y = W x        W (N, C), x (C):  2 N C operations, N C numbers read

so the time is that of reading, and there are two ways to less of it: a layout that the processor
reads at its full speed, and fewer bytes a weight.

    Laid    on a CPU. fp32: W by columns for one row; oneDNN's blocks for several, and for prompts
            bf16, where the CPU multiplies it: oneDNN's blocks; half the bytes, too
    int8    W ≈ s c        c a byte, s a number a row                            1 byte
    int4    W ≈ s c + m    c in 0 .. 15, s and m for 32 weights of a row         0.625 bytes

Weights only: x stays what it is, sums are fp32. int8: s is the largest |w| / 127. int4: m is the
smallest and m + 15 s the largest of the 32 weights. One s for 128 weights and no m would be 0.52
bytes, and raise the perplexity of a model of 135 M weights by half; these raise it by 11 %
(docs/weights.md). The output head, whose errors no later layer evens out, has int8 beside int4.

    B = 1         multiply and add in the threads that hold the codes; each has its own sums
    B 2 to 16     the tensor cores: codes are turned into x's number format (int8's exactly, int4's
                  with s and m, rounded once), x is padded to 16 rows; they are read and turned once
                  for all rows
    B above 16    a prompt, or a large batch: its time is that of the products, and W is written out
                  again for each pass; so it is on a CPU, where there is no kernel, for every token

Row by row, B rows would turn the codes into numbers B times, and that, not the reading, takes the
time from B = 2 on: slower than bf16, which has nothing to turn (computed, not measured).

How int4 lies in memory: a group of 32 is 16 bytes, and byte j of it holds weight j in its low and
weight j + 16 in its high half, as in GGUF's Q4_1. So a thread reads 16 bytes in a row, a group, and
the two halves of what it read meet two stretches of x. Scales lie (2, C / 32, N): s, then m, a
group's side by side, in fp16. Sums, and operands of the tensor cores, do go from thread to thread,
through shared memory.

Under a backward (trainer/qlora.py) a kernel writes the weights out for every product, and nothing
but the codes is kept: `frozen_linear`. [QLoRA] 2305.14314 has another code (NF4, 4 bits spaced like
a normal distribution's quantiles, 64 a group); here it is the one above: one format serves both.

Left out: activations in int8, calibration (GPTQ, AWQ): what is rounded is rounded to nearest.
Anchor: gpt-fast, 62 % of an A100's practical bandwidth in int8 and 51 % in int4.
Letters: N rows of W, C columns, B rows of x.
Alone: `python -m kernels.quantize` prints errors and bytes of a layer, and times on a GPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from kernels.launch import fused, jit, tl, triton

GROUP = 32              # weights that share a step and a lowest value in int4
FEW = 16                # rows of x up to which the weights are read coded: rows of a matrix product
ROWS_ON_CPU = 8         # rows for which oneDNN lays out its blocks


# ---- codes ----

def encode(w, bits):
    """w (N, C) -> codes, scales: int8 (N, C), fp32 (N); or uint8 (N, 16 g), fp16 (2, g, N) for the
    g = C / 32 groups of a row, the last filled up with its last weight."""
    if not w.isfinite().all():
        raise ValueError("quantize: a weight is not a number; take another checkpoint")
    if bits == 4:
        parts = [encode_int4(rows.float()) for rows in w.split(CHUNK)]      # less memory at a time
        codes, scales = zip(*parts)
        return torch.cat(codes), torch.cat(scales, -1)
    w = w.float()
    s = w.abs().amax(-1, keepdim=True) / 127
    return (w / s.masked_fill(s == 0, 1)).round().to(torch.int8), s[:, 0]


def encode_int4(w):
    """w (N, C), fp32 -> uint8 (N, 16 g), fp16 (2, g, N)."""
    N, C = w.shape
    filled = torch.cat((w, w[:, -1:].expand(N, -C % GROUP)), 1).view(N, -1, GROUP)      # (N, g, 32)
    low, high = filled.aminmax(dim=-1, keepdim=True)                                    # (N, g, 1)
    s, m = ((high - low) / 15).half(), low.half()
    if not (s.isfinite() & m.isfinite()).all():
        raise ValueError("quantize: a weight is beyond 65,504, fp16's largest; take int8")
    c = ((filled - m.float()) / s.float().masked_fill(s == 0, 1)).round().clamp(0, 15)
    low, high = c.to(torch.uint8).split(GROUP // 2, -1)
    scales = torch.stack((s[..., 0].T, m[..., 0].T))                                    # (2, g, N)
    return (low | high << 4).view(N, -1), scales


def written_out(codes, scales):
    """The weights (N, C) that codes and scales stand for, in fp32; int4's filled up."""
    if codes.dtype == torch.int8:
        return codes.float() * scales[:, None]
    c = codes.view(len(codes), -1, GROUP // 2)
    c = torch.cat((c & 15, c >> 4), -1).float()                         # (N, g, 32)
    s, m = scales.float().transpose(1, 2)[..., None]                    # (N, g, 1) each
    return (c * s + m).view(len(codes), -1)


# ---- the specification ----

def gemv_spec(x, codes, scales):
    """x (B, C) -> (B, N) in x's dtype; products and sums in fp32."""
    return (x.float() @ written_out(codes, scales)[:, :x.shape[-1]].T).to(x.dtype)


# ---- the kernels: one program, BLOCK_N rows of W for one row of x ----

# Rows of x are the grid's quickest axis: the programs that follow each other read the same codes,
# which the second finds in the GPU's own cache.

@jit
def gemv_int8(x_ptr, codes_ptr, scales_ptr, y_ptr, N,
              C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    row, offs_n = tl.program_id(0), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_c, real = tl.arange(0, BLOCK_C), offs_n < N
    at = offs_n.to(tl.int64)[:, None] * C                  # in 64 bits: a head may pass 2³¹
    acc = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for c in range(0, C, BLOCK_C):
        inside = c + offs_c < C
        w = tl.load(codes_ptr + at + (c + offs_c)[None, :], mask=real[:, None] & inside[None, :],
                    other=0)
        x = tl.load(x_ptr + row * C + c + offs_c, mask=inside, other=0.)
        acc += w.to(tl.float32) * x.to(tl.float32)[None, :]
    y = tl.sum(acc, 1) * tl.load(scales_ptr + offs_n, mask=real, other=0.)
    tl.store(y_ptr + row * N + offs_n, y.to(y_ptr.dtype.element_ty), mask=real)


@jit
def gemv_int4(x_ptr, codes_ptr, scales_ptr, y_ptr, N,
              C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, HALF: tl.constexpr):
    """HALF: bytes of a group; BLOCK_G: groups at a time."""
    row, offs_n = tl.program_id(0), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_g, offs_c, real = tl.arange(0, BLOCK_G), tl.arange(0, HALF), offs_n < N
    GROUPS: tl.constexpr = (C + 2 * HALF - 1) // (2 * HALF)
    at = offs_n.to(tl.int64)[:, None, None] * (GROUPS * HALF)
    y = tl.zeros((BLOCK_N, BLOCK_G), tl.float32)
    for first in range(0, GROUPS, BLOCK_G):
        group = first + offs_g
        inside = real[:, None] & (group < GROUPS)[None, :]
        places = (group * HALF)[:, None] + offs_c[None, :]                  # of bytes, (G, HALF)
        w = tl.load(codes_ptr + at + places[None, :, :], mask=inside[:, :, None], other=0)
        c = places + (group * HALF)[:, None]                                # of x
        low = tl.load(x_ptr + row * C + c, mask=c < C, other=0.).to(tl.float32)
        high = tl.load(x_ptr + row * C + c + HALF, mask=c + HALF < C, other=0.).to(tl.float32)
        part = (w & 15).to(tl.float32) * low[None, :, :]
        part += (w >> 4).to(tl.float32) * high[None, :, :]
        scale = scales_ptr + group[None, :] * N + offs_n[:, None]
        y += tl.sum(part, 2) * tl.load(scale, mask=inside, other=0.).to(tl.float32)
        y += tl.sum(low + high, 1)[None, :] * tl.load(scale + GROUPS * N, mask=inside,
                                                      other=0.).to(tl.float32)
    y = tl.sum(y, 1)
    tl.store(y_ptr + row * N + offs_n, y.to(y_ptr.dtype.element_ty), mask=real)


# ---- the same for 2 to 16 rows of x, on the tensor cores ----

@jit
def few_rows(x_ptr, offs_b, offs_c, rows, C: tl.constexpr):
    """Columns offs_c of all rows of x, padded with zeros to as many rows as a product takes."""
    inside = (offs_b < rows)[:, None] & (offs_c < C)[None, :]
    return tl.load(x_ptr + offs_b[:, None] * C + offs_c[None, :], mask=inside, other=0.)


@jit
def few_int8(x_ptr, codes_ptr, scales_ptr, y_ptr, rows, N,
             C: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """One program: BLOCK_N rows of W for all rows of x."""
    offs_b, offs_n = tl.arange(0, ROWS), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_c, real = tl.arange(0, BLOCK_C), offs_n < N
    at = offs_n.to(tl.int64)[:, None] * C
    y = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for c in range(0, C, BLOCK_C):
        w = tl.load(codes_ptr + at + (c + offs_c)[None, :],
                    mask=real[:, None] & (c + offs_c < C)[None, :], other=0)
        x = few_rows(x_ptr, offs_b, c + offs_c, rows, C)
        y = tl.dot(x, tl.trans(w.to(x.dtype)), y, input_precision="ieee")
    y *= tl.load(scales_ptr + offs_n, mask=real, other=0.)[None, :]
    tl.store(y_ptr + offs_b[:, None] * N + offs_n[None, :], y.to(y_ptr.dtype.element_ty),
             mask=(offs_b < rows)[:, None] & real[None, :])


@jit
def few_int4(x_ptr, codes_ptr, scales_ptr, y_ptr, rows, N, C: tl.constexpr, ROWS: tl.constexpr,
             BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, HALF: tl.constexpr):
    """The same for BLOCK_G groups at a time, whose halves of 16 meet two stretches of x each."""
    offs_b, offs_n = tl.arange(0, ROWS), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_g, offs_c, real = tl.arange(0, BLOCK_G), tl.arange(0, HALF), offs_n < N
    GROUPS: tl.constexpr = (C + 2 * HALF - 1) // (2 * HALF)
    at = offs_n.to(tl.int64)[:, None, None] * (GROUPS * HALF)
    y = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for first in range(0, GROUPS, BLOCK_G):
        group = first + offs_g
        inside = real[:, None] & (group < GROUPS)[None, :]
        places = (group * HALF)[:, None] + offs_c[None, :]                  # of bytes, (G, HALF)
        code = tl.load(codes_ptr + at + places[None, :, :], mask=inside[:, :, None], other=0)
        scale = scales_ptr + group[None, :] * N + offs_n[:, None]
        s = tl.load(scale, mask=inside, other=0.).to(tl.float32)[:, :, None]
        m = tl.load(scale + GROUPS * N, mask=inside, other=0.).to(tl.float32)[:, :, None]
        low = tl.reshape((code & 15).to(tl.float32) * s + m, (BLOCK_N, BLOCK_G * HALF))
        high = tl.reshape((code >> 4).to(tl.float32) * s + m, (BLOCK_N, BLOCK_G * HALF))
        k = first * HALF + tl.arange(0, BLOCK_G * HALF)
        c = k // HALF * 2 * HALF + k % HALF                                 # of x
        x = few_rows(x_ptr, offs_b, c, rows, C)
        y = tl.dot(x, tl.trans(low.to(x.dtype)), y, input_precision="ieee")
        x = few_rows(x_ptr, offs_b, c + HALF, rows, C)
        y = tl.dot(x, tl.trans(high.to(x.dtype)), y, input_precision="ieee")
    tl.store(y_ptr + offs_b[:, None] * N + offs_n[None, :], y.to(y_ptr.dtype.element_ty),
             mask=(offs_b < rows)[:, None] & real[None, :])


def tiles(bits, few=False):
    """A thread holds 16 bytes of codes, a group: 16 rows of 4 groups are two warps' share."""
    if few:
        columns = {"BLOCK_G": 4, "HALF": GROUP // 2} if bits == 4 else {"BLOCK_C": 256}
        return {"ROWS": FEW, "BLOCK_N": 32, **columns}
    if bits == 4:
        return {"BLOCK_N": 16, "BLOCK_G": 4, "HALF": GROUP // 2}
    return {"BLOCK_N": 4, "BLOCK_C": 512}


WARPS = {4: 2, 8: 4}
# warps and stages of the second form: some 10 to 24 KB of codes a multiprocessor are on their way;
# in fp32 there are fewer, or x would not fit the 99 KB of shared memory of a consumer's card
FEW_LAUNCH = {4: {"num_warps": 4, "num_stages": 6}, 8: {"num_warps": 4, "num_stages": 4}}


# ---- the public function ----

def gemv(x, codes, scales):
    """x (..., C) times what codes (N, C) and scales stand for, transposed: (..., N)."""
    C, four = x.shape[-1], codes.dtype == torch.uint8
    width = -(-C // GROUP) * GROUP // 2 if four else C
    if codes.shape[1] != width or x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"gemv: x {x.dtype} {tuple(x.shape)}; it takes float32, float16 or "
                         f"bfloat16, as wide as the codes {tuple(codes.shape)} say")
    kernel, N = fused(x, codes, scales), len(codes)
    rows = x.reshape(-1, C)
    if not kernel:
        return gemv_spec(rows, codes, scales).view(*x.shape[:-1], N)
    if not rows.numel():
        return x.new_zeros(*x.shape[:-1], N)
    if len(rows) > FEW:
        return F.linear(x, written_out(codes, scales)[:, :C].to(x.dtype))
    rows, y = rows.contiguous(), torch.empty(len(rows), N, dtype=x.dtype, device=x.device)
    bits, few = 4 if four else 8, len(rows) > 1
    launch = FEW_LAUNCH[bits] if x.dtype != torch.float32 else {"num_warps": 4, "num_stages": 2}
    size = tiles(bits, few)
    blocks = triton.cdiv(N, size["BLOCK_N"])
    if few:
        (few_int4 if four else few_int8)[(blocks,)](
            rows, codes, scales, y, len(rows), N, C=C, **size, **launch,
            enable_fp_fusion=True)
    else:
        (gemv_int4 if four else gemv_int8)[(len(rows), blocks)](
            rows, codes, scales, y, N, C=C, **size, num_warps=WARPS[bits], enable_fp_fusion=True)
    return y.view(*x.shape[:-1], N)


# ---- frozen weights under a backward ----

CHUNK = 1024            # rows that the specification writes out at a time


def written_in_spec(codes, scales, weight):
    """Fill weight (N, C) with what codes and scales stand for. Each is computed in fp32 and rounded
    once to weight's dtype; in fp32 there are only CHUNK rows at a time."""
    if codes.dtype == torch.int8:
        parts = zip(codes.split(CHUNK), scales.split(CHUNK))
    else:
        parts = zip(codes.split(CHUNK), scales.split(CHUNK, -1))
    for rows, (some, their) in zip(weight.split(CHUNK), parts):
        rows.copy_(written_out(some, their)[:, :weight.shape[1]])


@jit
def write_int8(codes_ptr, scales_ptr, w_ptr, N,
               C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """One program: BLOCK_N rows and BLOCK_C columns of W."""
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = offs_n < N
    inside = real[:, None] & (offs_c < C)[None, :]
    at = offs_n.to(tl.int64)[:, None] * C + offs_c[None, :]
    code = tl.load(codes_ptr + at, mask=inside, other=0)
    scale = tl.load(scales_ptr + offs_n, mask=real, other=0.)
    w = code.to(tl.float32) * scale[:, None]
    tl.store(w_ptr + at, w.to(w_ptr.dtype.element_ty), mask=inside)


@jit
def write_int4(codes_ptr, scales_ptr, w_ptr, N,
               C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, HALF: tl.constexpr):
    """One program: BLOCK_N rows of BLOCK_G groups; a group's two halves lie side by side in W."""
    group = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    offs_n, offs_c = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, HALF)
    GROUPS: tl.constexpr = (C + 2 * HALF - 1) // (2 * HALF)
    rows, inside = offs_n.to(tl.int64), (offs_n < N)[:, None] & (group < GROUPS)[None, :]
    places = (group * HALF)[:, None] + offs_c[None, :]                      # of bytes, (G, HALF)
    code = tl.load(codes_ptr + rows[:, None, None] * (GROUPS * HALF) + places[None, :, :],
                   mask=inside[:, :, None], other=0)
    scale = scales_ptr + group[None, :] * N + offs_n[:, None]
    s = tl.load(scale, mask=inside, other=0.).to(tl.float32)[:, :, None]
    m = tl.load(scale + GROUPS * N, mask=inside, other=0.).to(tl.float32)[:, :, None]
    low = (code & 15).to(tl.float32) * s + m
    high = (code >> 4).to(tl.float32) * s + m
    c = (places + (group * HALF)[:, None])[None, :, :]                      # of W
    at, real = w_ptr + rows[:, None, None] * C + c, (offs_n < N)[:, None, None]
    tl.store(at, low.to(w_ptr.dtype.element_ty), mask=real & (c < C))
    tl.store(at + HALF, high.to(w_ptr.dtype.element_ty), mask=real & (c + HALF < C))


WRITE = {4: {"BLOCK_N": 16, "BLOCK_G": 4, "HALF": GROUP // 2}, 8: {"BLOCK_N": 4, "BLOCK_C": 512}}


def written_in(codes, scales, C, dtype):
    """The weights (N, C) that codes and scales stand for, in dtype. 2.6 bytes a weight pass, of
    int4 to bf16: a layer of the 7B in 0.35 ms of an A100's 1.5 TB/s, beside 10 ms of its forward
    over 4,096 tokens (computed)."""
    N, bits = len(codes), 4 if codes.dtype == torch.uint8 else 8
    weight = torch.empty(N, C, dtype=dtype, device=codes.device)
    if not fused(codes, scales, weight):
        written_in_spec(codes, scales, weight)
        return weight
    size = WRITE[bits]
    columns = triton.cdiv(C, size["BLOCK_G"] * GROUP if bits == 4 else size["BLOCK_C"])
    (write_int4 if bits == 4 else write_int8)[(columns, triton.cdiv(N, size["BLOCK_N"]))](
        codes, scales, weight, N, C=C, **size, num_warps=WARPS[bits], enable_fp_fusion=False)
    return weight


class FrozenLinear(torch.autograd.Function):
    """x Wᵀ for frozen codes. W is written out for the product and forgotten, and once more for the
    gradient of x, dy W: what waits for backward is the codes alone."""

    @staticmethod
    def forward(ctx, x, codes, scales):
        ctx.save_for_backward(codes, scales)
        ctx.width = x.shape[-1]
        return F.linear(x, written_in(codes, scales, x.shape[-1], x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        codes, scales = ctx.saved_tensors
        return dy @ written_in(codes, scales, ctx.width, dy.dtype), None, None


def frozen_linear(x, codes, scales):
    """x (..., C) times what codes (N, C) and scales stand for, transposed: (..., N). For training
    beside weights that stay: x gets a gradient, they get none. Under autocast in its dtype."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return FrozenLinear.apply(x.to(dtype), codes, scales)


# ---- layers ----

class Coded(nn.Module):
    """A linear layer of a language model, its weights in int8 or int4."""

    def __init__(self, linear, bits):
        super().__init__()
        codes, scales = encode(linear.weight.detach(), bits)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        bias = None if linear.bias is None else linear.bias.detach()
        self.register_buffer("bias", bias)                  # OPT has them, a LLaMA has none

    def forward(self, x):
        y = gemv(x, self.codes, self.scales)
        return y if self.bias is None else y + self.bias


class Laid(nn.Module):
    """A linear layer on a CPU. In fp32 its weights twice: by columns, which MKL's one-row product
    reads up to half as fast again as by rows, and in oneDNN's blocks, whose product with 8 rows
    takes half of MKL's time, and with a prompt's two thirds. Twice the memory, too. In bf16 the
    blocks alone: one row takes half the time of bf16 by rows, a quarter to two thirds of fp32's.
    Measured on one core of an EPYC; what it is worth in all: python -m bench --cpu."""

    def __init__(self, linear):
        super().__init__()
        weight, self.bias = linear.weight.detach(), linear.bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS_ON_CPU)
        # what one row reads
        self.weight = weight.T.contiguous().T if weight.dtype == torch.float32 else self.packed

    def forward(self, x):
        if x.numel() == x.shape[-1] and self.weight is not self.packed:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def rebuild(model, make):
    """Every nn.Linear inside model becomes make(it); returns model. Not to be trained after."""
    for part in [m for m in model.modules() if type(m) is not nn.Linear]:   # else all stay alive
        for name, layer in part.named_children():
            if type(layer) is nn.Linear:
                setattr(part, name, make(layer))
    return model


def fast_bf16():
    """Does this CPU multiply bf16 (AVX512-BF16 or AMX)? Without, oneDNN widens every number first,
    which is slower than fp32, and says all the same that it supports it."""
    return (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
            and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()))


def lay(model):
    """`Laid` throughout, where that exists: on a CPU with oneDNN, fp32, and bf16 if it is fast."""
    weight = next(model.parameters())
    if weight.device.type == "cpu" and torch.backends.mkldnn.is_available() and (
            weight.dtype == torch.float32 or weight.dtype == torch.bfloat16 and fast_bf16()):
        return rebuild(model, Laid)
    return model


def quantize(model, bits):
    """`Coded` throughout a language model, its head in int8. The embedding table stays: a token
    reads one row."""
    head = getattr(model, "head", None)
    return rebuild(model, lambda layer: Coded(layer, 8 if layer is head else bits))


# ---- what tests/test_compile.py compiles ----

def compile_cases():
    """The layers of LLaVA-1.5 7B and the toy's widths; no launch."""
    cases, kernels = [], {(8, False): gemv_int8, (4, False): gemv_int4, (8, True): few_int8,
                          (4, True): few_int4}
    for bits, dtype, C, few in ((8, "bf16", 4096, False), (8, "bf16", 11008, False),
                                (8, "fp16", 256, False), (4, "bf16", 4096, False),
                                (4, "bf16", 11008, False), (4, "fp16", 256, False),
                                (8, "bf16", 4096, True), (8, "fp16", 11008, True),
                                (4, "bf16", 4096, True), (4, "fp16", 11008, True)):
        signature = {"x_ptr": f"*{dtype}", "codes_ptr": "*u8" if bits == 4 else "*i8",
                     "scales_ptr": "*fp16" if bits == 4 else "*fp32", "y_ptr": f"*{dtype}",
                     "N": "i32"}
        if few:
            signature["rows"] = "i32"
        cases.append({
            "name": f"{'few' if few else 'gemv'}_int{bits} C{C} {dtype}",
            "kernel": kernels[bits, few], "signature": signature,
            "constexprs": {"C": C, **tiles(bits, few)},
            "divisible": {"x_ptr", "codes_ptr", "scales_ptr", "y_ptr", "N"},
            **(FEW_LAUNCH[bits] if few else {"num_warps": WARPS[bits], "num_stages": 3}),
            # 16 rows: wgmma begins at 64, so sm_90 also gets mma.sync
            "dot": "HMMA" if few else False,
            # of x and scales a group has one number a thread; the codes come 16 bytes at a time
            **({"wide": .6} if bits == 4 else {})})
    for bits, dtype, C in ((8, "bf16", 4096), (4, "bf16", 4096), (4, "bf16", 11008),
                           (4, "fp32", 4096)):
        cases.append({
            "name": f"write_int{bits} C{C} {dtype}",
            "kernel": write_int4 if bits == 4 else write_int8,
            "signature": {"codes_ptr": "*u8" if bits == 4 else "*i8",
                          "scales_ptr": "*fp16" if bits == 4 else "*fp32",
                          "w_ptr": f"*{dtype}", "N": "i32"},
            "constexprs": {"C": C, **WRITE[bits]},
            "divisible": {"codes_ptr", "scales_ptr", "w_ptr", "N"},
            "num_warps": WARPS[bits], "num_stages": 3, "dot": False})
    return cases


if __name__ == "__main__":
    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    torch.manual_seed(0)
    print(f"quantize on {torch.cuda.get_device_name() if gpu else 'a CPU: no GPU here'}, {dtype}")
    for rows, columns in ((4096, 4096), (4096, 11008)):
        table = torch.randn(rows, columns, device=device) * columns ** -.5
        one = torch.randn(1, columns, device=device, dtype=dtype)
        for bits in (8, 4):
            c, s = encode(table, bits)
            exact = one.double() @ table.double().T
            far = float((gemv(one, c, s) - exact).norm() / exact.norm())
            size = c.nbytes + s.nbytes
            line = f"int{bits} {rows} x {columns}: {size / 1e6:6.1f} MB, error {far:.4f}"
            if gpu:
                ms = triton.testing.do_bench(lambda: gemv(one, c, s), return_mode="median")
                line += f", {ms:.4f} ms, {size / ms / 1e6:.0f} GB/s"
            print(line)
