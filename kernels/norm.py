"""kernels/norm.py: keep every row at one length, or every token drifts.

    RMSNorm     y = x / √(mean(x²) + ε) · w                        [RMSNorm] 1910.07467
    LayerNorm   y = (x - mean x) / √(var x + ε) · w + b            [LayerNorm] 1607.06450

    x = (3, 4), ε = 0, w = 1:   RMSNorm (3, 4) / √12.5 = (0.85, 1.13);   LayerNorm (-1, 1)

Bytes of memory traffic for each number of x in bfloat16, and for x (8192, 4096), a packed row of
Llama-2-7B with 33.6 million numbers:

    add, then RMSNorm, as PyTorch runs the specification
        add                          reads 2 + 2    writes 2
        to fp32                      reads 2        writes 4
        square                       reads 4        writes 4
        mean                         reads 4
        times 1 / √                  reads 4        writes 4
        back to bfloat16             reads 4        writes 2
        times w                      reads 2        writes 2       42 bytes,   1.41 GB
    one kernel                       reads 2 + 2    writes 2 + 2    8 bytes,   0.27 GB

A program holds one row in registers: it is read once, however often the formula uses it. Sums
are fp32. The sum x + residual is rounded to its dtype before it is normed, as it is when the two
are separate operations.

Kept for the backward: x (the sum, with a residual) and w, which are alive anyway. Mean and 1 / √
are computed again: the row is in registers, so that costs no traffic, and a checkpointed block
has nothing to restore.

The gradient of w is a sum over all rows. Atomic adds would sum in the order in which programs
happen to finish, a different one every run. Here a fixed number of programs walk over the rows;
each sums its own share into its own row of a (programs, C) table, and the table is summed last:
the same bits from run to run on one GPU model. A table for 264 programs has 4.3 MB.

Alone: `python -m kernels.norm` prints errors against fp64 and, on a GPU, times.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from kernels.launch import fused, INTERPRET, jit, tl, triton

WIDEST = 8192       # channels. A row must fit in the registers of one program: 16,384 spills


# ---- the specification ----

def rms_norm_spec(x, weight, eps, residual=None):
    if residual is not None:
        x = x + residual
    wide = x if x.dtype == torch.float64 else x.float()
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = weight * y.to(x.dtype)              # quirk: LLaMA rounds to x's dtype before the weight
    return y if residual is None else (x, y)


def layer_norm_spec(x, weight, bias, eps):
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


# ---- the forward kernel: one program, one row ----

@jit
def norm_forward(x_ptr, residual_ptr, weight_ptr, bias_ptr, sum_ptr, y_ptr,
                 x_stride, residual_stride, eps,
                 C: tl.constexpr, CENTRE: tl.constexpr, BLOCK_C: tl.constexpr):
    """CENTRE: subtract the mean first (LayerNorm). residual_ptr or bias_ptr None: there is none."""
    row = tl.program_id(0).to(tl.int64)         # row · stride can pass 2³¹
    offs_c = tl.arange(0, BLOCK_C)
    inside = offs_c < C
    x = tl.load(x_ptr + row * x_stride + offs_c, mask=inside, other=0.)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row * residual_stride + offs_c, mask=inside, other=0.)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * C + offs_c, x, mask=inside)
    rounded = x.dtype
    x = x.to(tl.float32)
    if CENTRE:
        x = tl.where(inside, x - tl.sum(x, 0) / C, 0.)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / C + eps)
    if not CENTRE:
        y = y.to(rounded).to(tl.float32)
    y *= tl.load(weight_ptr + offs_c, mask=inside, other=0.).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs_c, mask=inside, other=0.).to(tl.float32)
    tl.store(y_ptr + row * C + offs_c, y.to(y_ptr.dtype.element_ty), mask=inside)


# ---- the backward kernel ----
#
# With r = 1 / √(mean(x²) + ε), x̂ = x r and g = dy · w (x already without its mean in LayerNorm):
#     ∂r/∂xᵢ = -r³ xᵢ / C,   so   dxᵢ = gᵢ r + Σⱼ gⱼ xⱼ ∂r/∂xᵢ = r (gᵢ - x̂ᵢ mean(g x̂))
# Subtracting the mean is x - 1 mean(x), its own transpose, so LayerNorm subtracts mean(dx) from
# dx; mean(x̂) is 0, which leaves  dx = r (g - mean(g) - x̂ mean(g x̂)).
#     dw = Σ over rows of dy x̂,   db = Σ over rows of dy
# x + residual goes two ways, out and into the norm: its gradient is dsum + dx, for both addends.

@jit
def norm_backward(x_ptr, weight_ptr, dy_ptr, dsum_ptr, dx_ptr, dweight_ptr, dbias_ptr,
                  x_stride, rows, eps,
                  C: tl.constexpr, CENTRE: tl.constexpr, BLOCK_C: tl.constexpr):
    """Rows pid, pid + programs, pid + 2 programs ... dweight_ptr and dbias_ptr (programs, C)."""
    first, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    offs_c = tl.arange(0, BLOCK_C)
    inside = offs_c < C
    weight = tl.load(weight_ptr + offs_c, mask=inside, other=0.).to(tl.float32)
    dweight = tl.zeros((BLOCK_C,), tl.float32)
    dbias = tl.zeros((BLOCK_C,), tl.float32)
    for row in range(first, rows, programs):
        x = tl.load(x_ptr + row * x_stride + offs_c, mask=inside, other=0.).to(tl.float32)
        dy = tl.load(dy_ptr + row * C + offs_c, mask=inside, other=0.).to(tl.float32)
        if CENTRE:
            x = tl.where(inside, x - tl.sum(x, 0) / C, 0.)
        g = dy * weight
        r = tl.rsqrt(tl.sum(x * x, 0) / C + eps)
        x_hat = x * r
        dx = g - x_hat * (tl.sum(g * x, 0) * r / C)
        if CENTRE:
            dx -= tl.sum(g, 0) / C
        dx *= r
        if dsum_ptr is not None:
            dx += tl.load(dsum_ptr + row * C + offs_c, mask=inside, other=0.).to(tl.float32)
        tl.store(dx_ptr + row * C + offs_c, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        dweight += dy * x_hat
        dbias += dy
    if dweight_ptr is not None:
        tl.store(dweight_ptr + first * C + offs_c, dweight, mask=inside)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + first * C + offs_c, dbias, mask=inside)


def tile(C):
    """The row as one tile, padded to a power of two; 16 numbers a thread: two 128-bit loads."""
    block = triton.next_power_of_2(C)
    return {"BLOCK_C": block, "num_warps": min(max(block // 512, 1), 16)}


@functools.cache
def walkers(device, warps):
    """Programs of a backward: 16 warps for each multiprocessor, what its registers hold."""
    if INTERPRET:
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count * (16 // warps)


# ---- autograd ----

def rows_of(x):
    """(..., C) as (N, C), channels side by side; a view where one exists, else a copy."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


class Norm(torch.autograd.Function):
    """Keeps the normed row's input and w, nothing else."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps, centre):
        shape, C = x.shape, x.shape[-1]
        x2, added = rows_of(x), residual is not None
        extra = rows_of(residual) if added else None
        total = torch.empty(x2.shape, dtype=torch.promote_types(x.dtype, residual.dtype),
                            device=x.device) if added else x2
        y = torch.empty(x2.shape, dtype=torch.promote_types(total.dtype, weight.dtype),
                        device=x.device)
        norm_forward[(len(x2),)](x2, extra, weight, bias, total if added else None, y,
                                 x2.stride(0), extra.stride(0) if added else 0, eps, C=C,
                                 CENTRE=centre, **tile(C), enable_fp_fusion=True)
        total = total.view(shape) if added else x
        ctx.save_for_backward(total, weight)
        ctx.eps, ctx.centre, ctx.dtypes = eps, centre, (x.dtype, residual.dtype if added else None)
        ctx.set_materialize_grads(False)        # a sum that nobody uses costs no zeros
        return (total, y.view(shape)) if added else y.view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        total, weight = ctx.saved_tensors
        dsum, dy = (None, *grads)[-2:]
        x, C = rows_of(total), total.shape[-1]
        dy = torch.zeros_like(x) if dy is None else rows_of(dy).contiguous()
        dsum = None if dsum is None else rows_of(dsum).contiguous()
        tiles = tile(C)
        count = min(len(x), walkers(x.device, tiles["num_warps"]))
        dweight, dbias = (torch.empty(count, C, device=x.device) if needed else None
                          for needed in ctx.needs_input_grad[2:4])
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        norm_backward[(count,)](x, weight, dy, dsum, dx, dweight, dbias, x.stride(0), len(x),
                                ctx.eps, C=C, CENTRE=ctx.centre, **tiles, enable_fp_fusion=True)
        dx = dx.view(total.shape)
        dweight, dbias = (t if t is None else t.sum(0).to(weight.dtype) for t in (dweight, dbias))
        first, second = ctx.dtypes
        return dx.to(first), dx.to(second) if second else None, dweight, dbias, None, None


# ---- the public functions ----

def check(name, x, residual, weight, bias):
    C = x.shape[-1] if x.dim() else 0
    if not 1 <= C <= WIDEST:
        raise ValueError(f"{name}: {C} channels in x {tuple(x.shape)}; 1 to {WIDEST} are allowed")
    for what, t, shape in (("weight", weight, (C,)), ("bias", bias, (C,)),
                           ("residual", residual, tuple(x.shape))):
        if t is not None and tuple(t.shape) != shape:
            raise ValueError(f"{name}: {what} {tuple(t.shape)} with x {tuple(x.shape)}; it must "
                             f"be {shape}")
    for what, t in (("x", x), ("weight", weight), ("bias", bias), ("residual", residual)):
        if t is not None and t.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"{name}: {what} in {t.dtype}; float32, float16 and bfloat16 are "
                             "allowed")
    if not (weight.is_contiguous() and (bias is None or bias.is_contiguous())):
        raise ValueError(f"{name}: weight and bias with strides {weight.stride()}; they must be "
                         "contiguous")


def rms_norm(x, weight, eps, residual=None):
    """x (..., C), weight (C,) -> (..., C) in x's dtype; the mean of squares is taken in fp32.

    With residual (..., C): (x + residual, norm of x + residual), one pass over memory for both."""
    if fused(x, weight, residual):
        check("rms_norm", x, residual, weight, None)
        return Norm.apply(x, residual, weight, None, eps, False)
    return rms_norm_spec(x, weight, eps, residual)


def layer_norm(x, weight, bias, eps):
    """x (..., C), weight and bias (C,) -> (..., C)."""
    if fused(x, weight, bias):
        check("layer_norm", x, None, weight, bias)
        return Norm.apply(x, None, weight, bias, eps, True)
    return layer_norm_spec(x, weight, bias, eps)


def compile_cases():
    """The shipped tiles, for tests/compiled.py: widths of LLaMA, Q-Former and CLIP."""
    cases = []
    for C, centre, add in ((4096, False, True), (8192, False, False), (1024, True, False),
                           (768, True, False)):
        tiles = tile(C)
        forward = {"signature": {"x_ptr": "*bf16", "weight_ptr": "*bf16", "y_ptr": "*bf16",
                                 "x_stride": "i32", "residual_stride": "i32", "eps": "fp32"},
                   "constexprs": {"C": C, "CENTRE": centre, "BLOCK_C": tiles["BLOCK_C"]}}
        backward = {"signature": {"x_ptr": "*bf16", "weight_ptr": "*bf16", "dy_ptr": "*bf16",
                                  "dx_ptr": "*bf16", "dweight_ptr": "*fp32", "x_stride": "i32",
                                  "rows": "i32", "eps": "fp32"},
                    "constexprs": dict(forward["constexprs"])}
        for case, optional in ((forward, {"residual_ptr": add, "sum_ptr": add, "bias_ptr": centre}),
                               (backward, {"dsum_ptr": add, "dbias_ptr": centre})):
            for name, given in optional.items():
                kind = "*fp32" if name == "dbias_ptr" else "*bf16"
                case["signature" if given else "constexprs"][name] = kind if given else None
        name = ("layer_norm" if centre else "add_rms_norm" if add else "rms_norm") + f" C={C}"
        for way, kernel, case in (("forward", norm_forward, forward),
                                  ("backward", norm_backward, backward)):
            wide = {n for n in case["signature"] if n.endswith(("_ptr", "_stride"))}
            cases.append({"name": f"{name} {way}", "kernel": kernel, **case, "divisible": wide,
                          "num_warps": tiles["num_warps"], "num_stages": 3, "dot": False})
    return cases


if __name__ == "__main__":
    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    a, b, g = (torch.randn(8192 if gpu else 64, 4096, device=device).to(dtype) for _ in range(3))
    w, w0 = (1 + torch.randn(2, 4096, device=device) / 10).to(dtype)
    cases = {"add, RMSNorm": (lambda a, b, w, w0: rms_norm(a, w, 1e-6, b)[1],
                              lambda a, b, w, w0: rms_norm_spec(a, w, 1e-6, b)[1]),
             "LayerNorm": (lambda a, b, w, w0: layer_norm(a, w, w0, 1e-5),
                           lambda a, b, w, w0: layer_norm_spec(a, w, w0, 1e-5))}
    for title, (ours, spec) in cases.items():
        truth = spec(*(t.double() for t in (a, b, w, w0)))
        for name, f in (("ours", ours), ("specification", spec)):
            error = float((f(a, b, w, w0) - truth).abs().max())
            print(f"{title:13} {name:14} max |error| to fp64 {error:.1e}", end="")
            if gpu:
                leaf = a.clone().requires_grad_()
                print(f"   forward {triton.testing.do_bench(lambda: f(a, b, w, w0)):.3f} ms"
                      "   forward and backward "
                      f"{triton.testing.do_bench(lambda: f(leaf, b, w, w0).backward(g)):.3f} ms",
                      end="")
            print()
    print(torch.cuda.get_device_name() if gpu else "no GPU here: both are the specification")
