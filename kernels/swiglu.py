"""kernels/swiglu.py: the nonlinearities.

    SwiGLU      silu(gate) · up,  silu(x) = x σ(x)             [SwiGLU] 2002.05202
    QuickGELU   x σ(1.702 x)      OpenAI CLIP's: exact GELU loads without an error and is wrong
    GELU        x Φ(x), Φ the normal distribution's cumulative   [GELU] 1606.08415

               x    -2      -1      0     1      2
    silu           -0.24   -0.27    0    0.73   1.76
    QuickGELU      -0.06   -0.15    0    0.85   1.94
    GELU           -0.05   -0.16    0    0.84   1.95

All three are x times a smooth step, so one kernel does all three: the curve is a constant.

Bytes of memory traffic in bfloat16 for one row of Llama-2-7B's MLP (F = 11,008), and for 8,192:

    forward     PyTorch: silu reads F, writes F; product reads 2 F, writes F    110 KB   0.90 GB
                one kernel: reads gate and up, writes the product                66 KB   0.54 GB
    backward    one kernel: reads gate, up, dy; writes two gradients            110 KB   0.90 GB

Kept for the backward: the input, which the matrix product before it made. The curve and its slope
are computed again, in fp32; PyTorch's version also keeps silu(gate), 22 KB a row.

Alone: `python -m kernels.swiglu` prints errors against fp64 and, on a GPU, times.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from kernels.launch import fused, jit, tl, triton

# ---- the specification ----

def swiglu_spec(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def quick_gelu_spec(x):
    return x * torch.sigmoid(1.702 * x)


def gelu_spec(x):
    return F.gelu(x)


# ---- the forward kernel: one program, BLOCK numbers of one row ----

@jit
def curve(x, CURVE: tl.constexpr):
    """Value and slope in fp32.  (x s(x))' = s + x s',  σ' = σ (1 - σ),  Φ' = exp(-x²/2) / √2π"""
    if CURVE == "gelu":
        step = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        slope = step + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    else:
        a: tl.constexpr = 1.702 if CURVE == "quick_gelu" else 1.0
        step = tl.sigmoid(a * x)
        slope = step + a * x * step * (1 - step)
    return x * step, slope


@jit
def activation_forward(x_ptr, y_ptr, x_stride, width,
                       CURVE: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr):
    """y (N, width); x (N, width), or (N, 2 width) if GATED: gate first, then up."""
    blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)         # row · stride can pass 2³¹
    offs = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = offs < width
    x = tl.load(x_ptr + row * x_stride + offs, mask=inside, other=0.).to(tl.float32)
    y, slope = curve(x, CURVE)                  # the slope is not used: the compiler drops it
    if GATED:
        y *= tl.load(x_ptr + row * x_stride + width + offs, mask=inside, other=0.).to(tl.float32)
    tl.store(y_ptr + row * width + offs, y.to(y_ptr.dtype.element_ty), mask=inside)


# ---- the backward kernel ----
#
# y = c(x):          dx = dy c'(x)
# y = c(gate) up:    dgate = dy up c'(gate),   dup = dy c(gate)

@jit
def activation_backward(x_ptr, dy_ptr, dx_ptr, x_stride, width,
                        CURVE: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr):
    blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    offs = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = offs < width
    x = tl.load(x_ptr + row * x_stride + offs, mask=inside, other=0.).to(tl.float32)
    dy = tl.load(dy_ptr + row * width + offs, mask=inside, other=0.).to(tl.float32)
    y, slope = curve(x, CURVE)
    kind = dx_ptr.dtype.element_ty
    if GATED:
        up = tl.load(x_ptr + row * x_stride + width + offs, mask=inside, other=0.).to(tl.float32)
        at = dx_ptr + row * (2 * width) + offs
        tl.store(at, (dy * up * slope).to(kind), mask=inside)
        tl.store(at + width, (dy * y).to(kind), mask=inside)
    else:
        tl.store(dx_ptr + row * width + offs, (dy * slope).to(kind), mask=inside)


TILE = {"BLOCK": 2048, "num_warps": 8}          # 8 numbers a thread: one 128-bit load


# ---- autograd ----

def rows_of(x):
    """(..., W) as (N, W), neighbours side by side; a view where one exists, else a copy."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


class Activation(torch.autograd.Function):
    """Keeps its input, nothing else."""

    @staticmethod
    def forward(ctx, x, kind, gated):
        x2, width = rows_of(x), x.shape[-1] // (2 if gated else 1)
        y = torch.empty(*x.shape[:-1], width, dtype=x.dtype, device=x.device)
        grid = (len(x2) * triton.cdiv(width, TILE["BLOCK"]),)
        activation_forward[grid](x2, y, x2.stride(0), width, CURVE=kind, GATED=gated, **TILE,
                                 enable_fp_fusion=True)
        ctx.save_for_backward(x)
        ctx.kind, ctx.gated = kind, gated
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, = ctx.saved_tensors
        x2, dy = rows_of(x), dy.contiguous()
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        grid = (len(x2) * triton.cdiv(dy.shape[-1], TILE["BLOCK"]),)
        activation_backward[grid](x2, dy, dx, x2.stride(0), dy.shape[-1], CURVE=ctx.kind,
                                  GATED=ctx.gated, **TILE, enable_fp_fusion=True)
        return dx, None, None


# ---- the public functions ----

def check(name, x, halves):
    if not x.dim() or not x.shape[-1] or x.shape[-1] % halves:
        raise ValueError(f"{name}: x {tuple(x.shape)}; its last size must be a positive multiple "
                         f"of {halves}")
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"{name}: x in {x.dtype}; float32, float16 and bfloat16 are allowed")


def swiglu(gate_up):
    """(..., 2F), gate first -> (..., F)."""
    if fused(gate_up):
        check("swiglu", gate_up, 2)
        return Activation.apply(gate_up, "silu", True)
    return swiglu_spec(gate_up)


def quick_gelu(x):
    if fused(x):
        check("quick_gelu", x, 1)
        return Activation.apply(x, "quick_gelu", False)
    return quick_gelu_spec(x)


def gelu(x):
    """The exact one, with Φ; not the tanh approximation."""
    if fused(x):
        check("gelu", x, 1)
        return Activation.apply(x, "gelu", False)
    return gelu_spec(x)


def compile_cases():
    """The shipped tile, for tests/compiled.py."""
    cases = []
    for kind, gated in (("silu", True), ("quick_gelu", False), ("gelu", False)):
        for way, kernel, pointers in (
                ("forward", activation_forward, ("x_ptr", "y_ptr")),
                ("backward", activation_backward, ("x_ptr", "dy_ptr", "dx_ptr"))):
            signature = {**{p: "*bf16" for p in pointers}, "x_stride": "i32", "width": "i32"}
            cases.append({"name": f"{'swiglu' if gated else kind} {way}", "kernel": kernel,
                          "signature": signature, "divisible": set(signature),
                          "constexprs": {"CURVE": kind, "GATED": gated, "BLOCK": TILE["BLOCK"]},
                          "num_warps": TILE["num_warps"], "num_stages": 3, "dot": False})
    return cases


if __name__ == "__main__":
    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    for ours, spec, width in ((swiglu, swiglu_spec, 22016), (quick_gelu, quick_gelu_spec, 4096),
                              (gelu, gelu_spec, 4096)):
        x = torch.randn(8192 if gpu else 64, width, device=device).to(dtype)
        truth = spec(x.double())
        for name, f in (("ours", ours), ("specification", spec)):
            print(f"{ours.__name__:10} {name:14} max |error| to fp64 "
                  f"{float((f(x) - truth).abs().max()):.1e}", end="")
            if gpu:
                leaf, g = x.clone().requires_grad_(), torch.ones_like(truth, dtype=dtype)
                print(f"   forward {triton.testing.do_bench(lambda: f(x)):.3f} ms   forward and "
                      f"backward {triton.testing.do_bench(lambda: f(leaf).backward(g)):.3f} ms",
                      end="")
            print()
    print(torch.cuda.get_device_name() if gpu else "no GPU here: both are the specification")
