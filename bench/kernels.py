"""bench.kernels: each kernel on its own, beside PyTorch's and others' form of the same operation.

A table is a generator of (name of a row, function that makes the row); bench/measure.py says how a
row is timed. Whether the kernels are right is another table: bench/correctness.py. Rows of Liger
and flash-attn come where these packages are installed.
"""

import importlib.util
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import sdpa_kernel, SDPBackend
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from bench.correctness import kernel_file
from bench.measure import (
    attempt,
    both_ways,
    compiled,
    DEVICE,
    Failed,
    GPU,
    one_way,
    peak,
    pick,
    race,
    random,
    speeds,
    with_gradients,
)
from llama import Config, Llama


def installed(package):
    return importlib.util.find_spec(package) is not None


WAYS = {"forward": one_way, "both": both_ways}         # without, and with gradients


# ------------------------------------------------------------------------------- attention

def sdpa(backend, causal, *x):
    with sdpa_kernel(getattr(SDPBackend, pick(f"{backend.upper()}_ATTENTION", "MATH"))):
        return F.scaled_dot_product_attention(*x, is_causal=causal)


def packed_baselines(lengths, x):
    """{name: (function, inputs)} of what takes packed rows without padding. x: q, k, v (1, T, H,
    D)."""
    ends = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)
    longest, rows = max(lengths), [t[0] for t in x]

    def varlen(*x):
        from torch.nn.attention.varlen import varlen_attn
        return varlen_attn(*x, ends, ends, longest, longest, window_size=(-1, 0))

    def flash_attn(*x):
        from flash_attn import flash_attn_varlen_func
        return flash_attn_varlen_func(*x, ends, ends, longest, longest, causal=True)

    runs = {"varlen": (varlen, rows)}
    if installed("flash_attn"):
        runs["flash-attn"] = flash_attn, rows
    return runs


def flash_attn(causal, *x):
    from flash_attn import flash_attn_func
    return flash_attn_func(*x, causal=causal)


def attention_runs(B, Q, T, H, D, lengths):
    """{name: (function, inputs)} of one shape; causal where D is 128."""
    file, causal = kernel_file("attention"), D == 128
    x = random(B, Q, H, D), random(B, T, H, D), random(B, T, H, D)
    spans = file.document_spans([lengths], DEVICE) if lengths else None
    begin = spans[0, 0] if lengths else torch.zeros(T, device=DEVICE)
    turned = [t.transpose(1, 2).contiguous() for t in x]
    padded = [random(len(lengths), H, max(lengths), D) for _ in x] if lengths else turned
    rule = file.causal if causal else file.full

    def flex(*x):
        mask = None
        if causal:
            mask = create_block_mask(lambda b, h, i, j: (i >= j) & (begin[i] == begin[j]), None,
                                     None, Q, T, device=DEVICE)
        masks.append(compiled(partial(flex_attention, block_mask=mask)))
        return masks[0](*x)

    def flex_again(*x):                 # the mask is made once, outside the timed turns
        return masks[0](*x) if masks else flex(*x)

    masks, runs = [], {"ours": (partial(file.attention, allow=rule, doc_spans=spans), x)}
    for name in ("flash", "cudnn", "efficient"):
        runs[name] = partial(sdpa, name, causal), padded
    if GPU:                             # on a CPU it has no backward
        runs["flex"] = flex_again, turned
    if lengths and GPU:
        runs |= packed_baselines(lengths, x)
    elif GPU and installed("flash_attn"):
        runs["flash-attn"] = partial(flash_attn, causal), x
    return runs


def attention():
    """TFLOP/s of 4 T² D H operations (half if causal, the documents' own squares if packed), x 3.5
    with backward. PyTorch's scaled_dot_product_attention gets packed rows as a padded batch."""
    def row(way, B, Q, T, H, D, lengths):
        squares = sum(n * n for n in lengths) if lengths else B * Q * T
        work = 4 * D * H * squares / (1 + (D == 128)) * (1 if way == "forward" else 3.5)
        found = WAYS[way](attention_runs(B, Q, T, H, D, lengths))
        return {"D": D, **speeds(work / 1e3, found, "GEMM")}

    mixed = [900, 870, 760, 940, 1020, 880, 910, 850, 1062]
    for what, B, Q, T, H, D, lengths in (
            ("packed ~900", 1, 8192, 8192, 32, 128, mixed), ("CLIP", 32, 577, 577, 16, 64, None),
            ("packed 606", 1, 8192, 8192, 32, 128, [606] * 13 + [314]),
            ("Q-Former", 64, 32, 257, 12, 64, None), ("4k", 2, 4096, 4096, 32, 128, None)):
        B, Q, T, H, lengths = pick((B, Q, T, H, lengths), (1, 16, 16, 2, lengths and [5, 11]))
        for way in WAYS:
            yield f"{what}, {way}", partial(row, way, B, Q, T, H, D, lengths)


# ------------------------------------------------------------------------ norms, activations

def liger_rms_norm(x, w, r):
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    return LigerRMSNormFunction.apply(x + r, w, 1e-5)


def liger_layer_norm(x, w, b):
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction
    return LigerLayerNormFunction.apply(x, w, b, 1e-5)


def liger_swiglu(x):
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    return LigerSiLUMulFunction.apply(*x.chunk(2, -1))


LIGER = {"add, RMSNorm": liger_rms_norm, "LayerNorm": liger_layer_norm, "SwiGLU": liger_swiglu}


def elementwise():
    """GB/s of the bytes that must be moved, forward alone and with backward."""
    norm, rot, glu = map(kernel_file, ("norm", "rope", "swiglu"))
    N, C, M, D = pick((8192, 4096, 11008, 128), (8, 64, 96, 16))
    x, r, w, b = random(N, C), random(N, C), random(C), random(C)
    table = rot.rope_table(torch.arange(N, device=DEVICE)[None], D, 1e4)

    def row(way, what, ours, spec, inputs, often):
        runs = {"ours": (ours, inputs), "eager": (spec, inputs),
                "compile": (compiled(spec), inputs)}
        if what in LIGER and installed("liger_kernel"):
            runs["Liger"] = LIGER[what], inputs
        return speeds(often * inputs[0].nbytes, WAYS[way](runs), "copy")

    # inputs, then how often the first is read or written: forward, and with backward
    for what, ours, spec, inputs, *times in (
            ("add, RMSNorm", lambda x, w, r: norm.rms_norm(x, w, 1e-5, r)[1],
             lambda x, w, r: norm.rms_norm_spec(x, w, 1e-5, r)[1], (x, w, r), 4, 7),
            ("SwiGLU", glu.swiglu, glu.swiglu_spec, (random(N, 2 * M),), 1.5, 4),
            ("RoPE, q and k", lambda x: rot.rope(x, *table), lambda x: rot.rope_spec(x, *table),
             (random(1, N, 64, D),), 2, 4),
            ("LayerNorm", lambda *a: norm.layer_norm(*a, 1e-5),
             lambda *a: norm.layer_norm_spec(*a, 1e-5), (x, w, b), 2, 5),
            ("QuickGELU", glu.quick_gelu, glu.quick_gelu_spec, (x,), 2, 5)):
        for way, often in zip(WAYS, times):
            yield f"{what}, {way}", partial(row, way, what, ours, spec, inputs, often)


# ------------------------------------------------------------------- loss, decoding, optimizer

def liger_loss(labels, x, w):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    return LigerFusedLinearCrossEntropyLoss(ignore_index=-100)(w, x, labels)


def head():
    """The output head and its loss, both ways: milliseconds, and GB above the inputs."""
    file = kernel_file("cross_entropy")
    N, C, V = pick((8192, 4096, 32000), (64, 32, 100))

    def row(supervised):
        x, w = random(N, C, grad=True), random(V, C, grad=True)
        one = [torch.ones((), device=DEVICE)]
        w.data *= C ** -.5
        labels = torch.randint(V, (N,), device=DEVICE)
        labels[supervised:] = file.IGNORE
        rows, logits, weight = x.detach()[:supervised], random(supervised, V), w.detach()
        eager = partial(file.linear_cross_entropy_spec, labels=labels)
        ours = partial(file.linear_cross_entropy, labels=labels)
        runs = {"ours": partial(with_gradients, ours, (x, w), one),
                "three products": lambda: (rows @ weight.T, logits @ weight, logits.T @ rows),
                "eager": partial(with_gradients, eager, (x, w), one),
                "compile": partial(with_gradients, compiled(eager), (x, w), one)}
        if installed("liger_kernel"):
            runs["Liger"] = partial(with_gradients, partial(liger_loss, labels), (x, w), one)
        found = race(runs)
        memory = {f"{k} GB": peak(runs[k]) for k in runs if isinstance(found[k], float)}
        return {"rows": N, "supervised": supervised, **found, **memory}

    for supervised in (N // 5, N):
        yield f"{supervised} of {N} rows", partial(row, supervised)


def decode():
    """GB/s of keys and values read by one query a head."""
    file = kernel_file("decode")

    @torch.no_grad()
    def row(B, S, H, G):
        S, D = pick((S, 128), (40, 16))
        q, (k, v) = random(B, 1, H, D), random(2, B, S, G, D)
        theirs = partial(F.scaled_dot_product_attention, *(t.transpose(1, 2) for t in (q, k, v)),
                         enable_gqa=H != G)
        found = race({"ours": lambda: file.decode(q, k, v),
                      "eager": lambda: file.decode_spec(q, k, v), "sdpa": theirs}, turns=15)
        return {"H": H, "G": G, **speeds(2 * k.nbytes, found, "copy")}

    for B, S, H, G in ((1, 1024, 32, 32), (1, 4096, 32, 32), (8, 1024, 32, 32), (1, 16384, 32, 32),
                       (8, 4096, 32, 8)):
        yield f"batch {B}, context {S}, {G} key heads", partial(row, B, S, H, G)


def optimizer():
    """One step over 2 G weights, so that PyTorch's fp32 states fit beside them; GB kept besides
    weights and gradients. Not interleaved: two of these do not fit at once."""
    sizes = pick([202_375_168] * 10, [5000])            # a layer of Llama-2-7B each

    def row(name, make, dtype, kept, moved):
        def build():
            weights = [torch.nn.Parameter(torch.zeros(n, dtype=dtype, device=DEVICE))
                       for n in sizes]
            for p in weights:
                p.grad = torch.full_like(p, 1e-3)
            return make(weights)
        try:
            step = attempt(name, build).step
        except Failed as why:
            return {name: str(why)}
        found = race({name: step}, turns=5, warm=2, flush=False)
        fast = speeds(sum(sizes) * moved, found, "copy")
        fast["GB/s"] = fast.pop(name)
        return {f"{name} ms" if isinstance(ms, float) else name: ms for name, ms in found.items()
                } | {"GB kept": sum(sizes) * kept / 1e9, **fast}

    ours, torchs = kernel_file("adamw").AdamW, torch.optim.AdamW
    for what, name, make, dtype, kept, moved in (
            ("ours", "ours", ours, torch.bfloat16, 4, 14),
            ("ours, stochastic", "ours", partial(ours, stochastic=True), torch.bfloat16, 2, 10),
            ("torch fused", "fused", partial(torchs, fused=True), torch.float32, 8, 28),
            ("torch foreach", "foreach", partial(torchs, foreach=True), torch.float32, 8, 28)):
        yield what, partial(row, name, make, dtype, kept, moved)


def curves():
    """50 steps on the same rows from the same weights: the loss under each optimizer."""
    V, C, depth, H, M = pick((8192, 1024, 8, 16, 2816), (64, 32, 2, 2, 64))

    def row(name, dtype, make):
        torch.manual_seed(0)
        model = Llama(Config(V, C, depth, H, H, M)).to(DEVICE, dtype)
        ids = torch.randint(V, pick((16, 512), (2, 16)), device=DEVICE)
        optimizer, losses = make(model.parameters(), lr=2e-5), []

        def steps():
            for _ in range(pick(50, 2)):
                logits = model(ids)[:, :-1].flatten(0, 1).float()
                loss = F.cross_entropy(logits, ids[:, 1:].flatten())
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(round(float(loss.detach()), 4))
        try:
            attempt(name, steps)
        except Failed as why:
            return {name: str(why)}
        return {"first": losses[0], "last": losses[-1], "losses": losses}

    ours, torchs = kernel_file("adamw").AdamW, torch.optim.AdamW
    for what, name, dtype, make in (
            ("torch fp32", "torch", torch.float32, torchs), ("ours", "ours", torch.bfloat16, ours),
            ("ours, stochastic", "ours", torch.bfloat16, partial(ours, stochastic=True)),
            ("torch bf16, rounded to nearest", "torch", torch.bfloat16, torchs)):
        yield what, partial(row, name, dtype, make)
