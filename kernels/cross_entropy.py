"""kernels/cross_entropy.py: the output head and the loss, over supervised rows only.

In instruction tuning perhaps one token in five is trained. Logits for the other four are the
largest tensor of the whole model and nobody reads them, so they are never made:

    rows = labels != IGNORE;   loss = mean( logsumexp(z) - z[label] ) over rows,   z = x Wᵀ

Label smoothing ε moves the target from 1 at the label to 1 - ε there plus ε / V everywhere:

    loss of a row = logsumexp(z) - (1 - ε) z[label] - ε mean(z)
    gradient dz   = softmax(z) - (1 - ε) [v = label] - ε / V

    z = (2, 0, 0), label 0, ε = 0:   loss = log(e² + 2) - 2 = 0.24,   dz = (-0.21, 0.11, 0.11)

Memory for a packed row of 8,192 tokens, V = 32,000 words, bfloat16:

    PyTorch, all rows     logits 0.52 GB; the same in fp32 1.05 GB; their log-softmax 1.05 GB, in
                          the backward beside two gradients of its size: 3.1 GB at once
    here, 1,638 rows      one buffer of logits, 0.10 GB; never more than CHUNK rows: 0.26 GB

The gradient of a softmax needs nothing but the softmax, so it is made at once, in the forward, on
top of the logits it came from: the row is read for logsumexp, read again and overwritten by dz.
Two more matrix products turn dz into dx and dW before the next chunk takes the buffer. So every
logit is made once, by three matrix products altogether, and the backward only scales dx and dW by
the gradient that comes in. That is 1 where the loss itself is differentiated. The scaling kernel
looks at the number on the GPU, and where it is 1 leaves without touching memory: dW alone has
0.26 GB, and to read and write it is 0.3 ms at 1.7 TB/s, what an A100 reaches.

dW is a sum over chunks. One chunk, the usual case, is one product, rounded once. More are summed in
fp32 (0.52 GB while they are), or rounding would grow with their number. No atomics: the same bits
from run to run. A frozen head gets no dW and costs none of this.

What it does not do: dz is made before a loss scaler multiplies the loss, so float16 may lose it
below 6e-8. Train in bfloat16. Gradients are handed over by the backward, so there is only one.

Alone: `python -m kernels.cross_entropy` prints errors against fp64 and, on a GPU, times.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from kernels.launch import fused, jit, tl, triton

IGNORE = -100           # PyTorch's own mark for a row without a label
CHUNK = 4096            # rows of logits that exist at a time


# ---- the specification ----

def linear_cross_entropy_spec(x, head, labels, weights=None, smoothing=0.0):
    logits = F.linear(x, head)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if weights is None:
        return F.cross_entropy(logits, labels, label_smoothing=smoothing)
    return (F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
            * weights).sum()


# ---- the kernel: one program, one row; forward and backward in one ----

@jit
def loss_rows(logits_ptr, labels_ptr, weights_ptr, loss_ptr, stride, V, scale, smoothing,
              GRADIENT: tl.constexpr, BLOCK_V: tl.constexpr):
    """loss (N,) of logits (N, V); GRADIENT: the logits become weight · scale · dz.

    stride, at least V, is a multiple of 16: up to there a row is read and written 128 bits at a
    time, and what lies beyond V is put out of the way in registers."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    label = tl.load(labels_ptr + row)
    chosen = tl.load(logits_ptr + label).to(tl.float32)
    highest = float("-inf")
    total = 0.                                  # Σ exp(z - highest), fp32
    plain = 0.                                  # Σ z, fp32
    for start in range(0, V, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        z = tl.load(logits_ptr + offs_v, mask=offs_v < stride, other=0.).to(tl.float32)
        plain += tl.sum(tl.where(offs_v < V, z, 0.), 0)
        z = tl.where(offs_v < V, z, float("-inf"))
        higher = tl.maximum(highest, tl.max(z, 0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(z - higher), 0)
        highest = higher
    # logsumexp(z) = highest + log(total); the differences are small numbers, and lose no digits
    loss = (1 - smoothing) * (highest - chosen) + smoothing * (highest - plain / V) + tl.log(total)
    tl.store(loss_ptr + row, loss)
    if GRADIENT:
        if weights_ptr is not None:
            scale *= tl.load(weights_ptr + row)
        for start in range(0, V, BLOCK_V):
            offs_v = start + tl.arange(0, BLOCK_V)
            inside = offs_v < stride
            z = tl.load(logits_ptr + offs_v, mask=inside, other=0.).to(tl.float32)
            target = smoothing / V + tl.where(offs_v == label, 1 - smoothing, 0.)
            dz = scale * (tl.exp(z - highest) / total - target)
            tl.store(logits_ptr + offs_v, dz.to(logits_ptr.dtype.element_ty), mask=inside)


@jit
def scale_in_place(t_ptr, factor_ptr, numel, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr)
    if factor != 1.:
        offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        t = tl.load(t_ptr + offs, mask=offs < numel, other=0.).to(tl.float32)
        tl.store(t_ptr + offs, (t * factor).to(t_ptr.dtype.element_ty), mask=offs < numel)


ROW_TILE = {"BLOCK_V": 4096, "num_warps": 8}
SCALE_TILE = {"BLOCK": 4096, "num_warps": 8}


# ---- autograd ----

class HeadLoss(torch.autograd.Function):
    """Keeps finished gradients. `graded` False: nobody will ask for them."""

    @staticmethod
    def forward(ctx, x, head, labels, weights, rows, smoothing, graded):
        (N, C), V, n = x.shape, len(head), len(rows)
        needs_x, needs_head = (graded and needed for needed in ctx.needs_input_grad[:2])
        chunks = max(triton.cdiv(n, CHUNK), 1)
        size = max(triton.cdiv(n, chunks), 1)               # of equal chunks: no short last one
        buffer = torch.empty(size, triton.cdiv(V, 16) * 16, dtype=x.dtype, device=x.device)
        buffer[:, V:].zero_()                               # is read, though not used: no NaN
        losses = torch.empty(n, device=x.device)
        dx = torch.zeros_like(x, memory_format=torch.contiguous_format) if needs_x else None
        dhead = torch.zeros(V, C, device=x.device) if needs_head and chunks > 1 else None
        for first in range(0, n, size):
            part = slice(first, min(first + size, n))
            some = x.index_select(0, rows[part])                           # (chunk, C)
            logits = buffer[:len(some), :V]
            torch.mm(some, head.t(), out=logits)
            loss_rows[(len(some),)](
                buffer, labels[part], None if weights is None else weights[part], losses[part],
                buffer.stride(0), V, 1 / n if weights is None else 1., float(smoothing),
                GRADIENT=needs_x or needs_head, **ROW_TILE, enable_fp_fusion=True)
            if needs_x:
                dx.index_copy_(0, rows[part], logits @ head)
            if needs_head:
                share = logits.t() @ some                                  # (V, C)
                dhead = share if chunks == 1 else dhead.add_(share)
        if needs_head:
            dhead = head.new_zeros(V, C) if dhead is None else dhead.to(head.dtype)
        ctx.made = dx, dhead
        return losses.mean() if weights is None else (losses * weights).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, factor):
        if ctx.made is None:
            raise RuntimeError("linear_cross_entropy: a second backward; the first one handed the "
                               "gradients over, call the function again instead of retain_graph")
        made, ctx.made = ctx.made, None
        for t in made:
            if t is not None and t.numel():
                scale_in_place[(triton.cdiv(t.numel(), SCALE_TILE["BLOCK"]),)](
                    t, factor, t.numel(), **SCALE_TILE, enable_fp_fusion=True)
        return *made, None, None, None, None, None


# ---- the public function ----

def check(x, head, labels, weights):
    if x.dim() != 2 or head.dim() != 2 or x.shape[1] != head.shape[1] or not head.numel():
        raise ValueError(f"linear_cross_entropy: x {tuple(x.shape)} with head {tuple(head.shape)}; "
                         "they must be (N, C) and (V, C)")
    if x.dtype != head.dtype or x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"linear_cross_entropy: x in {x.dtype}, head in {head.dtype}; both must "
                         "be float32, both float16 or both bfloat16")
    if labels.dtype != torch.int64:
        raise ValueError(f"linear_cross_entropy: labels in {labels.dtype}; they must be int64")
    for name, t in (("labels", labels), ("weights", weights)):
        if t is not None and t.shape != x.shape[:1]:
            raise ValueError(f"linear_cross_entropy: {name} {tuple(t.shape)} with x "
                             f"{tuple(x.shape)}; they must be {tuple(x.shape[:1])}")
    if weights is not None and weights.requires_grad:
        raise ValueError("linear_cross_entropy: weights that require a gradient; they are data, "
                         "detach them")


def linear_cross_entropy(x, head, labels, weights=None, smoothing=0.0):
    """Loss of the rows x (N, C) with head (V, C) against labels (N,); a scalar in fp32.

    Rows labelled IGNORE count for nothing. weights (N,): the sum of weight · loss instead of the
    mean. smoothing: the share of the target spread over all words."""
    if not 0 <= smoothing <= 1:
        raise ValueError(f"linear_cross_entropy: smoothing {smoothing}; it must be from 0 to 1")
    if not fused(x, head, labels, weights):
        return linear_cross_entropy_spec(x, head, labels, weights, smoothing)
    if torch.is_autocast_enabled(x.device.type):            # as F.linear would
        dtype = torch.get_autocast_dtype(x.device.type)
        x, head = x.to(dtype), head.to(dtype)
        fused(x, head)                                      # refuses bfloat16 in the interpreter
    check(x, head, labels, weights)
    kept = labels != IGNORE
    if weights is not None:
        kept = kept & (weights != 0)
    rows = kept.nonzero().squeeze(1)            # waits for the GPU: their number sets the chunks
    labels = labels[rows]
    if len(rows) and not 0 <= int(labels.min()) <= int(labels.max()) < len(head):
        raise ValueError(f"linear_cross_entropy: labels from {int(labels.min())} to "
                         f"{int(labels.max())}; 0 to {len(head) - 1} and {IGNORE} are allowed")
    weights = None if weights is None else weights[rows].float()
    return HeadLoss.apply(x, head, labels, weights, rows, smoothing, torch.is_grad_enabled())


def compile_cases():
    """The shipped tiles, for tests/compiled.py."""
    row = {"kernel": loss_rows, "num_warps": ROW_TILE["num_warps"], "num_stages": 3, "dot": False,
           "divisible": {"logits_ptr", "labels_ptr", "weights_ptr", "loss_ptr", "stride"}}
    kinds = {"logits_ptr": "*bf16", "labels_ptr": "*i64", "loss_ptr": "*fp32", "stride": "i32",
             "V": "i32", "scale": "fp32", "smoothing": "fp32"}
    block = {"BLOCK_V": ROW_TILE["BLOCK_V"]}
    return [
        {"name": "cross entropy, weights", **row, "constexprs": {"GRADIENT": True, **block},
         "signature": {**kinds, "weights_ptr": "*fp32"}},
        {"name": "cross entropy, mean", **row, "signature": kinds,
         "constexprs": {"GRADIENT": True, "weights_ptr": None, **block}},
        {"name": "cross entropy, loss alone", **row, "signature": kinds,
         "constexprs": {"GRADIENT": False, "weights_ptr": None, **block}},
        {"name": "scale in place", "kernel": scale_in_place,
         "signature": {"t_ptr": "*bf16", "factor_ptr": "*fp32", "numel": "i32"},
         "constexprs": {"BLOCK": SCALE_TILE["BLOCK"]}, "divisible": {"t_ptr", "factor_ptr",
                                                                     "numel"},
         "num_warps": SCALE_TILE["num_warps"], "num_stages": 3, "dot": False}]


if __name__ == "__main__":
    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    N, C, V = (1638, 4096, 32000) if gpu else (64, 256, 1000)
    x = torch.randn(N, C, device=device).to(dtype).requires_grad_()
    head = (torch.randn(V, C, device=device) / C ** .5).to(dtype).requires_grad_()
    labels = torch.randint(V, (N,), device=device)

    def gradients(f, *inputs):
        return torch.autograd.grad(f(*inputs, labels), inputs)

    truth = gradients(linear_cross_entropy_spec, *(t.detach().double().requires_grad_()
                                                   for t in (x, head)))
    for name, f in (("ours", linear_cross_entropy), ("specification", linear_cross_entropy_spec)):
        errors = [float((a - b).abs().max() / b.abs().max())
                  for a, b in zip(gradients(f, x, head), truth)]
        print(f"{name:14} error to fp64 over the largest entry: dx {errors[0]:.1e}, "
              f"dW {errors[1]:.1e}", end="")
        if gpu:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            gradients(f, x, head)
            print(f"   {triton.testing.do_bench(lambda: gradients(f, x, head)):.2f} ms, peak "
                  f"{(torch.cuda.max_memory_allocated() - before) / 1e9:.2f} GB with dx and dW",
                  end="")
        print()
    if gpu:
        z = torch.empty(N, V, dtype=dtype, device=device)
        bare = triton.testing.do_bench(lambda: (torch.mm(x.detach(), head.detach().t(), out=z),
                                                z @ head.detach(), z.t() @ x.detach()))
        print(f"the three bare matrix products: {bare:.2f} ms")
    print(torch.cuda.get_device_name() if gpu else "no GPU here: both are the specification")
