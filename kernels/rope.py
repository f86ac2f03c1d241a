"""kernels/rope.py: positions as rotations, so that q · k depends on the distance alone.

Channel pair m of D/2 turns by position · θₘ, θₘ = base^(-2m/D):         [RoPE] 2104.09864

    y₁ = x₁ cos - x₂ sin
    y₂ = x₂ cos + x₁ sin

Which channels are a pair is a convention. For D = 8:
    half-split (Hugging Face, here)    (0,4) (1,5) (2,6) (3,7)
    interleaved (the paper, Meta)      (0,1) (2,3) (4,5) (6,7)
The same model under the other convention is garbage, without an error: the rows of q and k differ
by a fixed permutation.

A model is stretched to a longer context by turning more slowly:
    linear   all pairs by 1/factor (Vicuna-16k)
    llama3   pairs that turn fewer than `low` times in the old context by 1/factor, those that turn
             more than `high` times not at all, in between a blend (Llama-3.1, [Llama3] 2407.21783)

Bytes of memory traffic for one token's q in bfloat16 (H = 32, D = 128: 8 KB), and for 8,192 tokens
of q and k:
    PyTorch: four products of halves     8 KB each
             two sums of halves         12 KB each
             put together               16 KB            72 KB        1.21 GB
    one kernel: reads x, writes y                        16 KB        0.27 GB

A rotation by an angle is undone by the negated angle, and its transpose is its inverse. So the
backward is the forward with -sin, and nothing of x is kept:

    dx₁ = dy₁ cos + dy₂ sin,   dx₂ = dy₂ cos - dy₁ sin

In place: a program reads all it needs before it writes it, so y may lie on x. The traffic is the
same; what is saved is a second copy of q and k. `inplace=True` is for a tensor that nobody else
reads, such as a projection's fresh output (a matrix product does not need its own output again).
Autograd watches: if somebody did need the old values, the backward raises. A gradient is never
turned in place, because a hook or a second consumer may hold it.

The kernel turns in fp32. The specification rounds cos and sin to x's dtype first, as Hugging Face
does.

Alone: `python -m kernels.rope` prints errors against fp64 and, on a GPU, times.
"""

from __future__ import annotations

import math

import torch
from torch.autograd.function import once_differentiable

from kernels.launch import fused, jit, tl, triton


def rope_table(positions, dim, base, scaling=None):
    """cos and sin (..., dim/2) in fp32 for positions (...).

    scaling: None, ("linear", factor) or ("llama3", factor, low, high, old context)."""
    # 1 / base^x and base^(-x) differ in the last bit; this is how the official tables are made
    theta = 1 / base ** (torch.arange(0, dim, 2, device=positions.device).float() / dim)
    if scaling and scaling[0] == "linear":
        theta = theta / scaling[1]
    elif scaling:
        _, factor, low, high, context = scaling
        turns = context * theta / (2 * math.pi)             # of each pair, in the old context
        fast = ((turns - low) / (high - low)).clamp(0, 1)   # 0: stretched, 1: left as it was
        theta = (1 - fast) * theta / factor + fast * theta
    angle = positions[..., None].float() * theta
    return angle.cos(), angle.sin()


# ---- the specification ----

def rope_spec(x, cos, sin):
    cos, sin = cos[:, :, None].to(x.dtype), sin[:, :, None].to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


# ---- the kernel, forward and (REVERSE) backward: one program, a tile of tokens and heads ----

@jit
def rope_kernel(x_ptr, y_ptr, cos_ptr, sin_ptr, T, H, x_batch, x_token, x_head,
                y_batch, y_token, y_head, table_batch,
                HALF: tl.constexpr, REVERSE: tl.constexpr,
                BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr):
    """x, y (B, T, H, 2 HALF) with any strides but the last; cos, sin (B or 1, T, HALF)."""
    batch = tl.program_id(2).to(tl.int64)       # batch · stride can pass 2³¹
    offs_t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None, None]
    offs_h = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[None, :, None]
    offs_d = tl.arange(0, BLOCK_D)[None, None, :]
    known = (offs_t < T) & (offs_d < HALF)                         # (BLOCK_T, 1, BLOCK_D)
    table = batch * table_batch + offs_t * HALF + offs_d
    cos = tl.load(cos_ptr + table, mask=known, other=0.)
    sin = tl.load(sin_ptr + table, mask=known, other=0.)
    if REVERSE:
        sin = -sin
    inside = known & (offs_h < H)                                  # (BLOCK_T, BLOCK_H, BLOCK_D)
    x = x_ptr + batch * x_batch + offs_t * x_token + offs_h * x_head + offs_d
    y = y_ptr + batch * y_batch + offs_t * y_token + offs_h * y_head + offs_d
    a = tl.load(x, mask=inside, other=0.).to(tl.float32)
    b = tl.load(x + HALF, mask=inside, other=0.).to(tl.float32)
    kind = y_ptr.dtype.element_ty
    tl.store(y, (a * cos - b * sin).to(kind), mask=inside)
    tl.store(y + HALF, (b * cos + a * sin).to(kind), mask=inside)


def tile(H, D):
    """2,048 pairs: each of 128 threads loads either half in two steps of 128 bits."""
    block_d = triton.next_power_of_2(D // 2)
    block_h = min(triton.next_power_of_2(H), 32)
    return {"BLOCK_T": max(2048 // (block_h * block_d), 1), "BLOCK_H": block_h, "BLOCK_D": block_d,
            "num_warps": 4}


def turn(x, y, cos, sin, reverse):
    """y = x turned; y may be x."""
    B, T, H, D = x.shape
    tiles = tile(H, D)
    grid = (triton.cdiv(T, tiles["BLOCK_T"]), triton.cdiv(H, tiles["BLOCK_H"]), B)
    if x.numel():
        rope_kernel[grid](x, y, cos, sin, T, H, *x.stride()[:3], *y.stride()[:3],
                          cos.stride(0) if len(cos) > 1 else 0, HALF=D // 2, REVERSE=reverse,
                          **tiles, enable_fp_fusion=True)
    return y


# ---- autograd ----

class Rope(torch.autograd.Function):
    """Keeps cos and sin, which all layers share."""

    @staticmethod
    def forward(ctx, x, cos, sin, inplace):
        ctx.save_for_backward(cos, sin)
        if inplace:
            ctx.mark_dirty(x)
            return turn(x, x, cos, sin, False)
        x = x if x.stride(-1) == 1 else x.contiguous()
        return turn(x, torch.empty(x.shape, dtype=x.dtype, device=x.device), cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        dy = dy if dy.stride(-1) == 1 else dy.contiguous()
        dx = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device)
        return turn(dy, dx, *ctx.saved_tensors, True), None, None, None


# ---- the public function ----

def check(x, cos, sin, inplace):
    if x.dim() != 4 or x.shape[-1] % 2 or not 2 <= x.shape[-1] <= 256:
        raise ValueError(f"rope: x {tuple(x.shape)}; it must be (B, T, H, D), D even, 2 to 256")
    B, T, _, D = x.shape
    if cos.shape != sin.shape or tuple(cos.shape) not in ((B, T, D // 2), (1, T, D // 2)):
        raise ValueError(f"rope: cos {tuple(cos.shape)} and sin {tuple(sin.shape)} with x "
                         f"{tuple(x.shape)}; both must be {(B, T, D // 2)} or {(1, T, D // 2)}")
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"rope: x in {x.dtype}; float32, float16 and bfloat16 are allowed")
    if cos.dtype != torch.float32 or sin.dtype != torch.float32:
        raise ValueError(f"rope: cos in {cos.dtype}, sin in {sin.dtype}; both must be float32")
    if inplace and (x.stride(-1) != 1 or 0 in x.stride()[:3]):
        raise ValueError(f"rope: x with strides {x.stride()} cannot be turned in place; the last "
                         "must be 1 and none 0")


def rope(x, cos, sin, inplace=False):
    """x (B, T, H, D) turned by cos, sin (B or 1, T, D/2); returns x's dtype.

    inplace: x itself is turned and returned. One call turns q and k, heads side by side."""
    if fused(x, cos, sin):
        check(x, cos, sin, inplace)
        return Rope.apply(x, cos.contiguous(), sin.contiguous(), inplace)
    return x.copy_(rope_spec(x, cos, sin)) if inplace else rope_spec(x, cos, sin)


def compile_cases():
    """The shipped tiles, for tests/compiled.py: q of Llama-2-7B, k of Llama-3-8B, D = 64."""
    cases = []
    for H, D in ((32, 128), (8, 128), (32, 64)):
        tiles = tile(H, D)
        signature = {"x_ptr": "*bf16", "y_ptr": "*bf16", "cos_ptr": "*fp32", "sin_ptr": "*fp32",
                     "T": "i32", "H": "i32", "x_batch": "i32", "x_token": "i32", "x_head": "i32",
                     "y_batch": "i32", "y_token": "i32", "y_head": "i32", "table_batch": "i32"}
        cases.append({"name": f"rope H={H} D={D}", "kernel": rope_kernel, "signature": signature,
                      "divisible": set(signature) - {"T", "H"}, "num_warps": tiles["num_warps"],
                      "constexprs": {"HALF": D // 2, "REVERSE": False,
                                     **{k: v for k, v in tiles.items() if k != "num_warps"}},
                      "num_stages": 3, "dot": False})
    return cases


if __name__ == "__main__":
    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    tokens = 8192 if gpu else 64
    x = torch.randn(1, tokens, 32, 128, device=device).to(dtype)
    cos, sin = rope_table(torch.arange(tokens, device=device)[None], 128, 1e4)
    truth = rope_spec(x.double(), cos.double(), sin.double())
    for name, f in (("ours", rope), ("specification", rope_spec)):
        print(f"{name:14} max |error| to fp64 {float((f(x, cos, sin) - truth).abs().max()):.1e}",
              end="")
        if gpu:
            print(f"   {triton.testing.do_bench(lambda: f(x, cos, sin)):.3f} ms", end="")
        print()
    print(torch.cuda.get_device_name() if gpu else "no GPU here: both are the specification")
