"""bench.correctness: every kernel on the GPU against fp64, before anything is timed.

A fast kernel that is wrong is worth nothing. The rule is that of the tests: the kernel's relative
error is at most twice that of the specification in the same number format. bf16, fp16 and fp32;
what compiles quickly comes first. Rows are (name, function that makes the row).

With bench/dry.py the same rows compile and launch every kernel and compare nothing; by that
bench/plan.py fills Triton's cache in parallel before it runs them on the GPU.
"""

import copy
import importlib
import math
from functools import cache, partial
from unittest import mock

import torch

from bench.measure import attempt, DEVICE, DRY, Failed, MODE, pick, random, with_gradients
from decoding import cuda_graph
from generate import generate_batch
from llama import Config, KVCache, Llama
from qformer import itc, itg, itm

HALF, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FORMATS = (FP32,) if MODE == "toy" else (HALF, FP32, FP16)
FLOOR = 1e-6                            # errors below this are those of fp32's own sums


def kernel_file(name):
    """kernels/<name>.py; `kernels.<name>` may be the function of that name."""
    return importlib.import_module(f"kernels.{name}")


def short_name(dtype):
    return {HALF: "bf16", FP16: "fp16", FP32: "fp32"}[dtype]


# ------------------------------------------------------------------------------- comparing

def distance(found, exact):
    return float(((found.double() - exact).norm() / exact.norm()).detach())


def judged(ours, spec):
    """The cells of a row from the errors of ours and of the specification, result by result."""
    if any(map(math.isnan, ours)):      # max() would pass over it
        return {"ok": False, "error": "NaN"}
    ratio = max(a / max(b, FLOOR) for a, b in zip(ours, spec))
    return {"ours off by": max(ours), "spec off by": max(spec), "times": round(ratio, 2),
            "ok": ratio <= 2}


def against_fp64(ours, spec, *inputs):
    """The row of ours(*inputs) and its gradients, beside the specification in fp64."""
    upstream = []
    try:
        found = attempt("ours", partial(with_gradients, ours, inputs, upstream))
    except Failed as why:
        return {"ok": False, "error": str(why)}
    if DRY:
        return {"ok": True}
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
    exact = with_gradients(spec, wide, upstream)
    errors = []
    for results in (found, with_gradients(spec, inputs, upstream)):
        errors.append([distance(a, b) for a, b in zip(results, exact)])
    return judged(*errors)


def answer_against_fp64(ours, spec, exact):
    """The same without gradients: three functions of nothing."""
    with torch.no_grad():
        try:
            found = attempt("ours", ours)
        except Failed as why:
            return {"ok": False, "error": str(why)}
        if DRY:
            return {"ok": True}
        truth = exact()
        return judged([distance(found, truth)], [distance(spec(), truth)])


# ------------------------------------------------------------------------------ operations

def norm_rows(dtype):
    """RMSNorm, with its residual, and LayerNorm."""
    norm = kernel_file("norm")
    N, C = pick((4096, 4096), (16, 64), (16, 4096))

    def draw(*shapes):
        return [random(*shape, grad=True, dtype=dtype) for shape in shapes]

    def both_sums(f):
        return lambda x, w, r: torch.cat(f(x, w, 1e-5, r))

    yield "rms_norm", lambda: against_fp64(
        lambda x, w: norm.rms_norm(x, w, 1e-5), lambda x, w: norm.rms_norm_spec(x, w, 1e-5),
        *draw((N, C), (C,)))
    yield "rms_norm, residual", lambda: against_fp64(
        both_sums(norm.rms_norm), both_sums(norm.rms_norm_spec), *draw((N, C), (C,), (N, C)))
    yield "layer_norm", lambda: against_fp64(
        lambda x, w, b: norm.layer_norm(x, w, b, 1e-5),
        lambda x, w, b: norm.layer_norm_spec(x, w, b, 1e-5), *draw((N, C // 4), (C // 4,),
                                                                  (C // 4,)))


def elementwise_rows(dtype):
    """Nonlinearities and rotary positions."""
    glu, rot = kernel_file("swiglu"), kernel_file("rope")
    N, C, T = pick((4096, 4096, 577), (16, 64, 17), (16, 4096, 17))
    for what in ("swiglu", "quick_gelu", "gelu"):
        yield what, partial(lambda what: against_fp64(
            getattr(glu, what), getattr(glu, f"{what}_spec"),
            random(N, C, grad=True, dtype=dtype)), what)

    def rotation():
        table = rot.rope_table(torch.arange(T, device=DEVICE)[None], 128, 1e4)
        return against_fp64(lambda x: rot.rope(x, *table), lambda x: rot.rope_spec(x, *table),
                            random(2, T, 32, 128, grad=True, dtype=dtype))
    yield "rope", rotation


def loss_rows(dtype):
    """The head and its loss: mean, weights, smoothing, a frozen head, rows without a label."""
    file = kernel_file("cross_entropy")
    N, C, V = pick((4096, 1024, 32000), (32, 64, 100), (32, 64, 32000))

    def row(weighted, smoothing, trained, supervised):
        x, head = random(N, C, grad=True, dtype=dtype), random(V, C, dtype=dtype)
        head = (head * C ** -.5).detach().requires_grad_(trained)
        labels = torch.randint(V, (N,), device=DEVICE)
        labels[supervised:] = file.IGNORE
        weights = torch.rand(N, device=DEVICE) if weighted else None
        more = {"labels": labels, "weights": weights, "smoothing": smoothing}
        return against_fp64(partial(file.linear_cross_entropy, **more),
                            partial(file.linear_cross_entropy_spec, **more), x, head)

    for what, *how in (("cross entropy", False, 0., True, N), ("weights", True, 0., True, N),
                       ("smoothing", False, .1, True, N), ("frozen head", True, 0., False, N),
                       ("one row in five", True, .1, True, N // 5),
                       ("two chunks", False, 0., True, N)):
        name = what if what == "cross entropy" else f"cross entropy, {what}"
        run = partial(row, *how)
        if what == "two chunks":
            run = partial(in_chunks, file, N // 2, run)
        yield name, run


def in_chunks(file, size, run):
    """run() with at most `size` rows of logits at a time: the head's gradient is then a sum."""
    with mock.patch.object(file, "CHUNK", size):
        return run()


def gemv_rows(dtype):
    """int8 and int4 weights: one row of x, several, and widths that are no whole group."""
    file = kernel_file("quantize")

    def row(bits, B, N, C):
        codes, scales = file.encode(random(N, C, dtype=FP32) * C ** -.5, bits)
        x = random(B, C, dtype=dtype)
        return answer_against_fp64(
            lambda: file.gemv(x, codes, scales), lambda: file.gemv_spec(x, codes, scales),
            lambda: x.double() @ file.written_out(codes, scales)[:, :C].double().T)

    def written_row(bits, N, C):
        codes, scales = file.encode(random(N, C, dtype=FP32) * C ** -.5, bits)
        found = attempt("ours", lambda: file.written_in(codes, scales, C, dtype))
        return {"ok": DRY or torch.equal(found, file.written_out(codes, scales)[:, :C].to(dtype))}

    sizes = pick((4096, 4096), (64, 256), (64, 4096))
    for bits in (8, 4):
        yield f"int{bits}, written out", partial(written_row, bits, 250, 344)
        for B in (1, 2, 8, 16):
            yield f"int{bits}, {B} rows", partial(row, bits, B, *sizes)
        yield f"int{bits}, C 11008", partial(row, bits, 1, *pick((4096, 11008), (64, 11008)))
        yield f"int{bits}, C 344, N 250", partial(row, bits, 3, 250, 344)


def adamw_rows():
    """The kernel's step and the specification's on the CPU. In the first step both start from the
    same moments: weights and low halves agree to the bit. Later the codes of the moments, which a
    GPU rounds with its quick square root, may differ by one here and there."""
    adam = kernel_file("adamw")

    def row(stochastic, dtype, steps):
        start, results = torch.randn(100_003), []
        for device in (DEVICE, "cpu"):
            p = torch.nn.Parameter(start.to(device, dtype))
            optimizer = adam.AdamW([p], stochastic=stochastic)
            for turn in range(steps):
                p.grad = start.roll(turn + 1).to(device, dtype)
                attempt("ours" if device == DEVICE else "CPU", optimizer.step)
            results.append(optimizer.master(p).detach().cpu())
        same = float((results[0] == results[1]).float().mean())
        return {"same bits": same, "ok": DRY or same >= (1 if steps == 1 else .999)}

    for what, stochastic, dtype in (("low halves", False, HALF), ("stochastic", True, HALF),
                                    ("fp32", False, FP32)):
        for steps in (1, 3):
            yield f"adamw, {what}, {steps} steps", partial(row, stochastic, dtype, steps)
    yield "adamw, states on the host", host_row


def host_row():
    """Five steps with the states on the device and on the host: the same bits of all that is kept.
    Large weights and small ones, so that copies take longer than steps and the other way round."""
    adam, host = kernel_file("adamw"), kernel_file("host_state")
    starts = [torch.randn(pick(size, 1000)) for size in (1 << 24, 100, 1 << 20, 1 << 24, 7)]

    def steps(offload):
        weights = [torch.nn.Parameter(start.to(DEVICE, HALF)) for start in starts]
        optimizers = [adam.AdamW([p], 1e-2, offload=offload) for p in weights]
        for turn in range(5):
            for p, start in zip(weights, starts):
                p.grad = start.roll(turn + 1).to(DEVICE, HALF)
            for optimizer, after in zip(optimizers, [*optimizers[1:], optimizers[0]]):
                after.fetch_ahead()
                optimizer.step()
        host.host_memory(weights[0].device).wait()
        kept = [x for o, p in zip(optimizers, weights) for x in o.state[p].values()]
        return [x.detach().cpu() for x in (*weights, *kept)]

    resident, moved = steps(False), attempt("ours", partial(steps, True))
    return {"ok": DRY or all(map(torch.equal, resident, moved))}


# ------------------------------------------------------------------------------- attention

def spanless(q, k, n):
    """A rule that does not say where it is True: every tile is asked."""
    return (k == q) | (k < n)


def decode_rows(dtype):
    """One query against a cache: grouped heads, padding, lengths on the device, a window."""
    dec, att = kernel_file("decode"), kernel_file("attention")

    def row(B, S, H, G, D, padded=False, ragged=False, window=0):
        S = pick(S, min(S, 70), S)
        q, (k, v) = random(B, 1, H, D, dtype=dtype), random(2, B, S, G, D, dtype=dtype)
        mask = lengths = None
        if padded:
            mask = torch.rand(B, S, device=DEVICE) < .8
            mask[:, S // 2] = True                          # so that every row sees a key
        if ragged:
            lengths = torch.arange(B, device=DEVICE, dtype=torch.int32) * 3 + S // 2 + 1
        rule = (att.sliding_window, window) if window else (att.causal, 0)
        more = {"attention_mask": mask, "lengths": lengths, "allow": rule[0], "n": rule[1]}
        return answer_against_fp64(
            lambda: dec.decode(q, k, v, **more), lambda: dec.decode_spec(q, k, v, **more),
            lambda: dec.decode_spec(q.double(), k.double(), v.double(), **more))

    for what, *sizes in (("1 key", 1, 1, 32, 32, 128), ("4:1", 3, 577, 32, 8, 128),
                         ("8:1", 2, 4096, 32, 4, 64), ("D 88", 2, 65, 16, 16, 88)):
        yield f"decode, {what}", partial(row, *sizes)
    for what, how in (("attention_mask", {"padded": True}), ("lengths", {"ragged": True}),
                      ("attention_mask and lengths", {"padded": True, "ragged": True}),
                      ("window", {"window": 33}), ("window and lengths", {"window": 33,
                                                                          "ragged": True})):
        yield f"decode, {what}", partial(row, 3, 577, 32, 8, 128, **how)


def attention_rows(dtype):
    """Attention in each head size and under each mask, forward and backward."""
    att = kernel_file("attention")
    T = pick(577, 65)
    spans = att.document_spans([[1, 37, 64, 65, 1, 132], [300]], DEVICE)
    mask = torch.rand(2, 300, device=DEVICE) < .8
    mask[:, 0] = True                                       # so that every row sees a key

    def row(D, rule, T, S=None, G=4, n=32, start=0, attention_mask=None, doc_spans=None,
            tiles=None):
        inputs = [random(2, T, 4, D, grad=True, dtype=dtype)]
        inputs += [random(2, S or T, G, D, grad=True, dtype=dtype) for _ in "kv"]
        more = rule, n, start, attention_mask, doc_spans
        patch = mock.patch.object(att, "tiles", tiles) if tiles else mock.patch.dict({})
        with patch:
            return against_fp64(lambda *x: att.attention(*x, *more),
                                lambda *x: att.reference(*x, *more), *inputs)

    for D in {HALF: (64, 88, 128), FP32: (64, 128), FP16: (128,)}[dtype]:
        rules = (att.full, att.causal)
        if D == 64:
            rules += itc, itg, itm, att.sliding_window, spanless
        for rule in rules:
            yield f"attention, {rule.__name__}, D {D}", partial(row, D, rule, T)
        yield f"attention, packed, D {D}", partial(row, D, att.causal, 300, doc_spans=spans)
        yield f"attention, padded, 4:1, D {D}", partial(row, D, att.causal, 300, G=1,
                                                        attention_mask=mask)
    if dtype == FP16:                   # compiled as bf16 is, all but the type
        return
    yield "attention, 32 queries, 257 keys", partial(row, 64, att.full, 32, 257)
    yield "attention, 17 queries from 240 on", partial(row, 128, att.causal, 17, 257, start=240)
    yield "attention, window from 240 on", partial(row, 128, att.sliding_window, 17, 257, start=240)
    if dtype == HALF:
        # wgmma needs four warps; two compile to mma.sync, as on an A100
        yield "attention, two warps", partial(row, 64, att.causal, T,
                                              tiles=lambda *_: (32, 32, 2, 2))


# ------------------------------------------------------------------------------- all together

def llama_rows():
    """A small LLaMA: its gradients to the bit under each policy, a token from the cache, a text as
    it is recorded in a CUDA graph."""
    model = Llama(Config(512, 256, 8, 4, 2, 704)).to(DEVICE, FP32 if MODE == "toy" else HALF)
    ids = torch.randint(512, (2, pick(300, 20)), device=DEVICE)

    def gradients(policy, offload):
        model.checkpoint, model.offload = policy, offload
        model.zero_grad()
        model(ids).float().square().mean().backward()
        return [p.grad.clone() for p in model.parameters()]

    @cache
    def plain():
        return gradients(None, False)

    def policy_row(policy, offload):
        found = attempt("ours", partial(gradients, policy, offload))
        return {"ok": DRY or all(map(torch.equal, found, plain()))}

    for policy, offload in ((None, False), ("none", False), ("attention", False), ("full", False),
                            ("attention", True), ("full", True)):
        yield (f"LLaMA's gradients, {policy}{', offloaded' * offload}",
               partial(policy_row, policy, offload))

    def token_row():
        with torch.no_grad():
            cache = KVCache(model.config, *ids.shape, model.embed.weight)
            model(ids[:, :-1], cache)
            one, row = model(ids[:, -1:], cache)[:, -1], model(ids)[:, -1]
            if DRY:
                return {"ok": True}
            exact = copy.deepcopy(model).to("cpu", torch.double)(ids.cpu())[:, -1]
            return judged([distance(one.cpu(), exact)], [distance(row.cpu(), exact)])
    yield "LLaMA's next token, with a cache", token_row

    def text_row(how):
        def text():
            return generate_batch(model, [ids[0].tolist(), ids[1, :7].tolist()],
                                  max_new_tokens=24, **how)
        recorded = attempt("ours", text)
        with mock.patch.object(cuda_graph, "SPEC", True):       # the same kernels, launched
            return {"ok": DRY or recorded == text()}
    for what, how in (("greedy", {}), ("sampled", {"temperature": 1.0, "top_p": .9,
                                                   "repetition_penalty": 1.2})):
        yield f"a text as it is recorded, {what}", partial(text_row, how)


def correctness():
    """All rows, what compiles quickly first."""
    for rows in (norm_rows, elementwise_rows, loss_rows, gemv_rows, decode_rows):
        for dtype in FORMATS:
            if rows is loss_rows and dtype == FP16:
                continue                # kernels/cross_entropy.py says why fp16 loses gradients
            for name, make in rows(dtype):
                yield f"{name}, {short_name(dtype)}", make
    yield from adamw_rows()
    for dtype in FORMATS:
        for name, make in attention_rows(dtype):
            yield f"{name}, {short_name(dtype)}", make
    yield from llama_rows()
