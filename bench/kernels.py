"""bench.kernels: each kernel on its own, beside PyTorch's and others' form of the same operation.

A table is a generator of rows, {"what": ..., "ours": ..., "ok": ...}; bench/measure.py says how
they are timed. `correctness` comes first: a fast kernel that is wrong is worth nothing.
"""

import copy
import importlib
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from torch.nn.attention import sdpa_kernel, SDPBackend
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from bench.measure import (
    both_ways,
    compiled,
    DEVICE,
    FAILURES,
    HALF,
    peak,
    pick,
    race,
    random,
    short,
    speeds,
    with_gradients,
)
from decoding import cuda_graph
from generate import generate_batch
from llama import Config, KVCache, Llama


def kernel_files(*names):
    """kernels/<name>.py; `kernels.<name>` may be the function of that name."""
    return [importlib.import_module(f"kernels.{name}") for name in names]


def itg(q, k, n):
    """The Q-Former's rule for captions: queries see queries, text sees queries and its past."""
    return (k < n) | ((q >= n) & (k <= q))


# ------------------------------------------------------------------------------- correctness

def against_fp64(what, ours, spec, *x):
    """A row: relative errors of output and gradients, ours and those of the specification."""
    upstream = []
    try:
        found = with_gradients(ours, x, upstream)
    except FAILURES as error:
        return {"what": what, "error": short(error), "ok": False}
    exact = with_gradients(spec, [t.detach().double().requires_grad_() for t in x], upstream)
    errors = []
    for result in (found, with_gradients(spec, x, upstream)):
        errors.append([float(((a - b).norm() / b.norm()).detach()) for a, b in zip(result, exact)])
    ratio = max(a / max(b, 1e-6) for a, b in zip(*errors))
    return {"what": what, "error": max(errors[0]), "of spec": max(errors[1]),
            "worst ratio": round(ratio, 2), "ok": ratio <= 2}


def attention_rows():
    """Attention in each head size and under each mask."""
    (att,) = kernel_files("attention")

    def row(what, T, D, G, rule, attention_mask=None, doc_spans=None):
        mask = rule, 32, 0, attention_mask, doc_spans
        inputs = [random(2, T, heads, D, grad=True) for heads in (4, G, G)]
        return against_fp64(f"attention {what} T {T} D {D}", lambda *x: att.attention(*x, *mask),
                            lambda *x: att.reference(*x, *mask), *inputs)

    doc_spans = att.document_spans([[1, 37, 64, 65, 1, 132], [300]], DEVICE)
    attention_mask = torch.rand(2, 300, device=DEVICE) < .8
    attention_mask[:, 0] = True                           # so that every row sees a key
    for D in (64, 88, 128):
        for rule in (att.full, att.causal, itg):
            yield row(rule.__name__, pick(577, 65), D, 4, rule)
        yield row("packed", 300, D, 4, att.causal, doc_spans=doc_spans)
        yield row("padded, 4:1", 300, D, 1, att.causal, attention_mask)
        # wgmma needs four warps; two compile to mma.sync, as on an A100
        with mock.patch.object(att, "tiles", lambda *_: (32, 32, 2, 2)):
            yield row("two warps", pick(577, 65), D, 4, att.causal)


def operation_rows():
    """Norms, nonlinearities, rotary positions, head and loss."""
    ce, norm, rot, glu = kernel_files("cross_entropy", "norm", "rope", "swiglu")
    N, C, V = pick((4096, 4096, 32000), (16, 64, 100))
    x, w, b, h = (random(*shape, grad=True) for shape in ((N, C), (C,), (C,), (V, C)))
    labels = torch.randint(V, (N,), device=DEVICE)
    table = rot.rope_table(torch.arange(577, device=DEVICE)[None], 128, 1e4)
    yield against_fp64("rms_norm", lambda *a: norm.rms_norm(*a, 1e-5),
                       lambda *a: norm.rms_norm_spec(*a, 1e-5), x, w)
    yield against_fp64("layer_norm", lambda *a: norm.layer_norm(*a, 1e-5),
                       lambda *a: norm.layer_norm_spec(*a, 1e-5), x, w, b)
    for what in ("swiglu", "quick_gelu", "gelu"):
        yield against_fp64(what, getattr(glu, what), getattr(glu, f"{what}_spec"), x)
    yield against_fp64("rope", lambda x: rot.rope(x, *table), lambda x: rot.rope_spec(x, *table),
                       random(2, 577, 32, 128, grad=True))
    yield against_fp64(
        "cross entropy", lambda x, h: ce.linear_cross_entropy(x, h * C ** -.5, labels),
        lambda x, h: ce.linear_cross_entropy_spec(x, h * C ** -.5, labels), x, h)


def decode_rows():
    """One query against a cache."""
    (dec,) = kernel_files("decode")
    for B, S, H, G, D in ((1, 1, 32, 32, 128), (3, 577, 32, 8, 128), (2, 4096, 32, 4, 64),
                          (2, 65, 16, 16, 88)):
        q, (k, v) = random(B, 1, H, D), random(2, B, S, G, D)
        exact = dec.decode_spec(q.double(), k.double(), v.double())
        ours, spec = (float((f(q, k, v) - exact).norm() / exact.norm())
                      for f in (dec.decode, dec.decode_spec))
        yield {"what": f"decode S {S} D {D}", "error": ours, "of spec": spec,
               "ok": ours <= 2 * max(spec, 1e-6)}


def adamw_rows():
    """Three steps on the GPU and on the CPU: the same arithmetic, so the same bits."""
    (adam,) = kernel_files("adamw")
    for stochastic in (False, True):
        start, results = torch.randn(100_003), []
        for device in (DEVICE, "cpu"):
            p = torch.nn.Parameter(start.to(device, torch.bfloat16))
            optimizer = adam.AdamW([p], stochastic=stochastic)
            for turn in range(3):
                p.grad = start.roll(turn + 1).to(device, torch.bfloat16)
                optimizer.step()
            results.append(p.detach().cpu())
        same = float((results[0] == results[1]).float().mean())
        yield {"what": f"adamw, stochastic {stochastic}", "equal to the CPU's": same,
               "ok": same == 1}


def llama_rows():
    """A small LLaMA: its gradients to the bit under each policy, and a token written by decode."""
    model = Llama(Config(512, 256, 8, 4, 2, 704)).to(DEVICE, HALF)
    ids, first = torch.randint(512, (2, pick(300, 20)), device=DEVICE), None
    for policy, offload in ((None, False), ("none", False), ("attention", False), ("full", False),
                            ("attention", True), ("full", True)):
        model.checkpoint, model.offload = policy, offload
        model.zero_grad()
        model(ids).float().square().mean().backward()
        grads = [p.grad for p in model.parameters()]
        first = first or [g.clone() for g in grads]
        yield {"what": f"LLaMA's gradients, {policy}{', offloaded' * offload}",
               "ok": all(map(torch.equal, grads, first))}
    with torch.no_grad():
        cache = KVCache(model.config, *ids.shape, model.embed.weight)
        model(ids[:, :-1], cache)
        exact = copy.deepcopy(model).to("cpu", torch.double)(ids.cpu())[:, -1]
        one, row = (float((y[:, -1].cpu() - exact).norm() / exact.norm())
                    for y in (model(ids[:, -1:], cache), model(ids)))
    yield {"what": "LLaMA's next token, with a cache", "error": one, "of the row": row,
           "ok": one <= 2 * max(row, 1e-6)}
    for how in ({}, {"temperature": 1.0, "top_p": .9, "repetition_penalty": 1.2}):
        def text():
            return generate_batch(model, [ids[0].tolist(), ids[1, :7].tolist()],
                                  max_new_tokens=24, **how)
        recorded = text()
        with mock.patch.object(cuda_graph, "SPEC", True):         # the same kernels, launched
            yield {"what": f"a text as it is recorded {how or 'greedy'}", "ok": recorded == text()}


def correctness():
    """Relative errors in bf16 against fp64, at most twice those of the specification in bf16."""
    for rows in (attention_rows, operation_rows, decode_rows, adamw_rows, llama_rows):
        yield from rows()


# ------------------------------------------------------------------------------------- speed

def attention():
    """TFLOP/s of 4 T² D H operations (half if causal, the documents' own squares if packed), x 3.5
    with backward. PyTorch's scaled_dot_product_attention gets packed rows as a padded batch."""
    (file,) = kernel_files("attention")

    def sdpa(backend, causal, *x):
        with sdpa_kernel(getattr(SDPBackend, pick(f"{backend.upper()}_ATTENTION", "MATH"))):
            return F.scaled_dot_product_attention(*x, is_causal=causal)

    mixed = [500, 700, 900, 1100, 1300, 800, 600, 1000, 900, 392]
    for what, B, Q, T, H, D, rows in (
            ("ViT", 32, 577, 577, 16, 64, None), ("2k", 4, 2048, 2048, 32, 128, None),
            ("packed ~900", 1, 8192, 8192, 32, 128, mixed),
            ("packed 606", 1, 8192, 8192, 32, 128, [606] * 13 + [314]),
            ("Q-Former", 64, 32, 257, 12, 64, None), ("4k", 2, 4096, 4096, 32, 128, None)):
        B, Q, T, H, rows = pick((B, Q, T, H, rows), (1, 16, 16, 2, rows and [5, 11]))
        causal = D == 128
        work = 4 * D * H * (sum(n * n for n in rows) if rows else B * Q * T) / (1 + causal)
        x = random(B, Q, H, D), random(B, T, H, D), random(B, T, H, D)
        doc_spans = file.document_spans([rows], DEVICE) if rows else None
        begin = doc_spans[0, 0] if rows else torch.zeros(T, device=DEVICE)
        mask = create_block_mask(lambda b, h, i, j: (i >= j) & (begin[i] == begin[j]), None, None,
                                 Q, T, device=DEVICE) if causal else None
        turned = [t.transpose(1, 2).contiguous() for t in x]
        padded = [random(len(rows), H, max(rows), D) for _ in x] if rows else turned
        rule = file.causal if causal else file.full
        runs = {"ours": (partial(file.attention, allow=rule, doc_spans=doc_spans), x),
                **{name: (partial(sdpa, name, causal), padded)
                   for name in ("flash", "cudnn", "efficient")},
                "flex": (compiled(partial(flex_attention, block_mask=mask)), turned)}
        for way, found in both_ways(runs):
            yield {"what": what, "D": D, "way": way, **speeds(
                work / 1e3 * (1 if way == "forward" else 3.5), found, "GEMM")}


def elementwise():
    """GB/s of the bytes that must be moved, forward alone and with backward."""
    norm, rot, glu = kernel_files("norm", "rope", "swiglu")
    N, C, M, D = pick((8192, 4096, 11008, 128), (8, 64, 96, 16))
    x, r, w, b = random(N, C), random(N, C), random(C), random(C)
    table = rot.rope_table(torch.arange(N, device=DEVICE)[None], D, 1e4)
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
        runs = {name: (f, inputs) for name, f in (("ours", ours), ("eager", spec),
                                                  ("compile", compiled(spec)))}
        for (way, found), often in zip(both_ways(runs), times):
            yield {"what": what, "way": way, **speeds(often * inputs[0].nbytes, found, "copy")}


def head():
    """The output head and its loss, both ways: milliseconds, and GB above the inputs."""
    (file,) = kernel_files("cross_entropy")
    N, C, V = pick((8192, 4096, 32000), (64, 32, 100))
    for supervised in (N // 5, N):
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
        found = race(runs)
        yield {"rows": N, "supervised": supervised, **found, **{
            f"{k} GB": peak(runs[k]) for k in runs if isinstance(found[k], float)}}


@torch.no_grad()
def decode():
    """GB/s of keys and values read by one query a head."""
    (file,) = kernel_files("decode")
    for B, S, H, G in ((1, 1024, 32, 32), (1, 4096, 32, 32), (8, 1024, 32, 32), (1, 16384, 32, 32),
                       (8, 4096, 32, 8)):
        S, D = pick((S, 128), (40, 16))
        q, (k, v) = random(B, 1, H, D), random(2, B, S, G, D)
        sdpa = partial(F.scaled_dot_product_attention, *(t.transpose(1, 2) for t in (q, k, v)),
                       enable_gqa=H != G)
        yield {"batch": B, "context": S, "H": H, "G": G, **speeds(2 * k.nbytes, race(
            {"ours": lambda: file.decode(q, k, v), "eager": lambda: file.decode_spec(q, k, v),
             "sdpa": sdpa}, turns=15), "copy")}


def optimizer():
    """One step over 7B weights; GB kept beside weights and gradients. Not interleaved: two of these
    do not fit at once."""
    ours, torchs = kernel_files("adamw")[0].AdamW, torch.optim.AdamW
    sizes = pick([202_375_168] * 32 + [262_144_000], [5000])        # Llama-2-7B, a tensor a layer
    for what, make, dtype, kept, moved in (
            ("ours", ours, torch.bfloat16, 4, 14),
            ("ours, stochastic", partial(ours, stochastic=True), torch.bfloat16, 2, 10),
            ("torch fused", partial(torchs, fused=True), torch.float32, 8, 28),
            ("torch foreach", partial(torchs, foreach=True), torch.float32, 8, 28)):
        try:
            weights = [torch.nn.Parameter(torch.zeros(n, dtype=dtype, device=DEVICE))
                       for n in sizes]
            for p in weights:
                p.grad = torch.full_like(p, 1e-3)
            found = race({"ms": make(weights).step}, turns=5, warm=2, flush=False)
        except FAILURES as error:
            found = {"ms": short(error)}
        weights = p = None
        fast = speeds(sum(sizes) * moved, found, "copy")
        yield {"what": what, **found, "GB kept": sum(sizes) * kept / 1e9, "GB/s": fast.pop("ms"),
               **fast}


def curves():
    """50 steps on the same rows from the same weights: the loss under each optimizer."""
    ours, torchs = kernel_files("adamw")[0].AdamW, torch.optim.AdamW
    V, C, depth, H, M = pick((8192, 1024, 8, 16, 2816), (64, 32, 2, 2, 64))
    for what, dtype, make in (
            ("torch fp32", torch.float32, torchs), ("ours", torch.bfloat16, ours),
            ("ours, stochastic", torch.bfloat16, partial(ours, stochastic=True)),
            ("torch bf16, rounded to nearest", torch.bfloat16, torchs)):
        torch.manual_seed(0)
        model = Llama(Config(V, C, depth, H, H, M)).to(DEVICE, dtype)
        ids = torch.randint(V, pick((16, 512), (2, 16)), device=DEVICE)
        optimizer, losses = make(model.parameters(), lr=2e-5), []
        for _ in range(pick(50, 2)):
            loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(round(float(loss.detach()), 4))
        yield {"what": what, "first": losses[0], "last": losses[-1], "losses": losses}
