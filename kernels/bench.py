"""kernels/bench.py: the kernels against what people use, in one call of ten minutes.

    python -m kernels.bench                     all tables, on the GPU that is here
    python -m kernels.bench attention decode    some of them
    python -m kernels.bench --cpu               tokens and training steps a second on one core,
                                                beside transformers, in turns
    python -m kernels.bench --rehearse          every table in toy sizes, on a CPU too: no figure
                                                of it means anything, but the code has run

Without a GPU it says so, compiles every kernel for sm_80 and sm_90 instead, and prints what the
machine code looks like (tests/compiled.py). How is measured: kernels/measure.py. Tables go to
kernels/results/<table>.json (--out: to another folder), correctness first. Exit status 1 if
anything of ours was wrong or did not run.

Some tables run whole models, texts and training steps; what they import lies above kernels/ and
imports it. They do so inside their functions: nobody imports this file, so there is no circle, and
what is above is not needed for the others.
"""

import argparse
import copy
import gc
import importlib
import math
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.measure import (CEILING, DEVICE, FAILURES, GPU, HALF, both_ways, ceilings, compiled,
                             peak, pick, pulled, race, random, report, short, speeds)

ROOT = Path(__file__).parents[1]


def kernel_files(*names):
    """kernels/<name>.py; `kernels.<name>` may be the function of that name."""
    return [importlib.import_module(f"kernels.{name}") for name in names]


def itg(q, k, n):
    """The Q-Former's rule for captions: queries see queries, text sees queries and its past."""
    return (k < n) | ((q >= n) & (k <= q))


def correctness():
    """Relative errors in bf16 against fp64, at most twice those of the specification in bf16."""
    att, ce, dec, norm, rot, glu, adam = kernel_files(
        "attention", "cross_entropy", "decode", "norm", "rope", "swiglu", "adamw")

    def row(what, ours, spec, *x):
        try:
            found = pulled(ours, x, pull := [])
        except FAILURES as error:
            return {"what": what, "error": short(error), "ok": False}
        exact = pulled(spec, [t.detach().double().requires_grad_() for t in x], pull)
        errors = [[float(((a - b).norm() / b.norm()).detach()) for a, b in zip(made, exact)]
                  for made in (found, pulled(spec, x, pull))]
        ratio = max(a / max(b, 1e-6) for a, b in zip(*errors))
        return {"what": what, "error": max(errors[0]), "of spec": max(errors[1]),
                "worst ratio": round(ratio, 2), "ok": ratio <= 2}

    def attended(what, T, D, G, rule, keep=None, documents=None):
        mask = rule, 32, 0, keep, documents
        return row(f"attention {what} T {T} D {D}", lambda *x: att.attention(*x, *mask),
                   lambda *x: att.reference(*x, *mask), *(random(2, T, h, D, grad=True)
                                                          for h in (4, G, G)))

    documents = att.packed([[1, 37, 64, 65, 1, 132], [300]], DEVICE)
    keep = torch.rand(2, 300, device=DEVICE) < .8
    keep[:, 0] = True                           # so that every row sees a key
    for D in (64, 88, 128):
        for rule in (att.full, att.causal, itg):
            yield attended(rule.__name__, pick(577, 65), D, 4, rule)
        yield attended("packed", 300, D, 4, att.causal, documents=documents)
        yield attended("padded, 4:1", 300, D, 1, att.causal, keep)
        # wgmma needs four warps; two compile to mma.sync, the way an A100 goes
        with mock.patch.object(att, "tiles", lambda *_: (32, 32, 2, 2)):
            yield attended("two warps", pick(577, 65), D, 4, att.causal)
    N, C, V = pick((4096, 4096, 32000), (16, 64, 100))
    x, w, b, h = (random(*shape, grad=True) for shape in ((N, C), (C,), (C,), (V, C)))
    labels, table = torch.randint(V, (N,), device=DEVICE), rot.rope_table(
        torch.arange(577, device=DEVICE)[None], 128, 1e4)
    for what, ours, spec, inputs in (
            ("rms_norm", norm.rms_norm, norm.rms_norm_spec, (x, w)),
            ("layer_norm", norm.layer_norm, norm.layer_norm_spec, (x, w, b))):
        yield row(what, lambda *a: ours(*a, 1e-5), lambda *a: spec(*a, 1e-5), *inputs)
    for what in ("swiglu", "quick_gelu", "gelu"):
        yield row(what, getattr(glu, what), getattr(glu, f"{what}_spec"), x)
    yield row("rope", lambda x: rot.rope(x, *table), lambda x: rot.rope_spec(x, *table),
              random(2, 577, 32, 128, grad=True))
    yield row("cross entropy", lambda x, h: ce.linear_cross_entropy(x, h * C ** -.5, labels),
              lambda x, h: ce.linear_cross_entropy_spec(x, h * C ** -.5, labels), x, h)
    for B, S, H, G, D in ((1, 1, 32, 32, 128), (3, 577, 32, 8, 128), (2, 4096, 32, 4, 64),
                          (2, 65, 16, 16, 88)):
        q, (k, v) = random(B, 1, H, D), random(2, B, S, G, D)
        exact = dec.decode_spec(q.double(), k.double(), v.double())
        ours, spec = (float((f(q, k, v) - exact).norm() / exact.norm())
                      for f in (dec.decode, dec.decode_spec))
        yield {"what": f"decode S {S} D {D}", "error": ours, "of spec": spec,
               "ok": ours <= 2 * max(spec, 1e-6)}
    for stochastic in (False, True):            # the same arithmetic on both, so the same bits
        start, made = torch.randn(100_003), []
        for device in (DEVICE, "cpu"):
            p = torch.nn.Parameter(start.to(device, torch.bfloat16))
            optimizer = adam.AdamW([p], stochastic=stochastic)
            for turn in range(3):
                p.grad = start.roll(turn + 1).to(device, torch.bfloat16)
                optimizer.step()
            made.append(p.detach().cpu())
        same = float((made[0] == made[1]).float().mean())
        yield {"what": f"adamw, stochastic {stochastic}", "equal to the CPU's": same,
               "ok": same == 1}
    yield from whole()


def whole():
    """A small LLaMA: its gradients to the bit under each policy, and a token written by decode."""
    import llama
    model = llama.Llama(llama.Config(512, 256, 8, 4, 2, 704)).to(DEVICE, HALF)
    ids, first = torch.randint(512, (2, pick(300, 20)), device=DEVICE), None
    for policy, offload in ((None, False), ("none", False), ("attention", False), ("full", False),
                            ("attention", True), ("full", True)):
        model.checkpoint, model.offload = policy, offload
        model.zero_grad()
        model(ids).float().square().mean().backward()
        made = [p.grad for p in model.parameters()]
        first = first or [g.clone() for g in made]
        yield {"what": f"LLaMA's gradients, {policy}{', offloaded' * offload}",
               "ok": all(map(torch.equal, made, first))}
    with torch.no_grad():
        cache = llama.Cache(model.config, *ids.shape, model.embed.weight)
        model(ids[:, :-1], cache)
        exact = copy.deepcopy(model).to("cpu", torch.double)(ids.cpu())[:, -1]
        one, row = (float((y[:, -1].cpu() - exact).norm() / exact.norm())
                    for y in (model(ids[:, -1:], cache), model(ids)))
    yield {"what": "LLaMA's next token, with a cache", "error": one, "of the row": row,
           "ok": one <= 2 * max(row, 1e-6)}
    import generate
    for how in ({}, {"temperature": 1.0, "top_p": .9, "repetition_penalty": 1.2}):
        def text():
            return generate.generate_batch(model, [ids[0].tolist(), ids[1, :7].tolist()],
                                           max_new_tokens=24, **how)
        recorded = text()
        with mock.patch.object(generate, "SPEC", True):         # the same kernels, launched
            yield {"what": f"a text as it is recorded {how or 'greedy'}", "ok": recorded == text()}


def attention():
    """TFLOP/s of 4 T² D H operations (half if causal, the documents' own squares if packed), x 3.5
    with backward. PyTorch's scaled_dot_product_attention gets packed rows as a padded batch."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
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
        documents = file.packed([rows], DEVICE) if rows else None
        begin = documents[0, 0] if rows else torch.zeros(T, device=DEVICE)
        mask = create_block_mask(lambda b, h, i, j: (i >= j) & (begin[i] == begin[j]), None, None,
                                 Q, T, device=DEVICE) if causal else None
        turned = [t.transpose(1, 2).contiguous() for t in x]
        padded = [random(len(rows), H, max(rows), D) for _ in x] if rows else turned
        rule = file.causal if causal else file.full
        runs = {"ours": (partial(file.attention, allow=rule, documents=documents), x),
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
        runs = {"ours": partial(pulled, partial(file.linear_cross_entropy, labels=labels), (x, w),
                                one),
                "three products": lambda: (rows @ weight.T, logits @ weight, logits.T @ rows),
                "eager": partial(pulled, eager, (x, w), one),
                "compile": partial(pulled, compiled(eager), (x, w), one)}
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


def llama_7b():
    """Ours with random weights, and transformers' on the very same memory, or why not."""
    import llama
    from data import export
    tiny = {"vocab": 100, "width": 32, "depth": 2, "heads": 2, "kv_heads": 2, "mlp": 64}
    config = llama.Config(**pick({}, tiny))
    torch.set_default_dtype(HALF)
    try:
        with torch.device(DEVICE):
            ours = llama.Llama(config)
            from transformers import LlamaConfig, LlamaForCausalLM
            theirs = LlamaForCausalLM(LlamaConfig(**config.to_hf(), attn_implementation="sdpa"))
        theirs.load_state_dict(export(ours, ours.names()), assign=True)
    except FAILURES as error:
        theirs = short(error)
    finally:
        torch.set_default_dtype(torch.float32)
    return ours, theirs


def step():
    """Llama-2-7B forward and backward in LLaVA's stages 2 (all trained) and 1 (frozen, gradients
    for the pictures' vectors): full rows for all, TFLOP/s of the model's own operations, GB above
    the weights. transformers runs on the same weights: its loss must be ours."""
    rot, checkpoint, ce = kernel_files("rope", "checkpoint", "cross_entropy")
    ours, theirs = llama_7b()
    c, models = ours.config, [ours]
    if isinstance(theirs, str):
        yield {"what": "transformers", "ms": theirs}
    else:
        models.append(theirs.train())
    # compiling takes minutes: last, so that it can be cut off
    for stage, size, compiling in ((2, (9, 900, 180), False), (1, (13, 606, 28), False),
                                   (2, (9, 900, 180), True)):
        B, T, supervised = pick(size, (2, 12, 3))
        x, losses = random(B, T, c.width, grad=True), {}
        labels = torch.randint(c.vocab, (B, T), device=DEVICE)
        labels[:, :T - supervised] = -100
        after = F.pad(labels[:, 1:], (0, 1), value=-100).reshape(-1)
        table = rot.rope_table(torch.arange(T, device=DEVICE)[None], c.head_dim, c.theta)

        def pull(name, loss):
            loss.backward()
            losses[name] = round(float(loss.detach()), 4)
            x.grad = None
            for model in models:
                model.zero_grad()

        def mine(name, policy):
            y = ours.norm(checkpoint.run(ours.blocks, x, *table, policy=policy))
            pull(name, ce.linear_cross_entropy(y.view(-1, c.width), ours.head.weight, after))

        def baseline(name, again, model):
            getattr(theirs, f"gradient_checkpointing_{'enable' if again else 'disable'}")()
            pull(name, model(inputs_embeds=x, labels=labels, use_cache=False).loss)

        for model in models:
            model.requires_grad_(stage == 2)
        plans = [(mine, f"ours {policy}", policy) for policy in (None, "none", "attention", "full")]
        baselines = [(baseline, "transformers", False, theirs),
                     (baseline, "transformers checkpoint", True, theirs)]
        if compiling:
            plans, baselines = [], [(baseline, "transformers compile", False, compiled(models[-1]))]
        runs = {name: partial(f, name, *how)
                for f, name, *how in plans + baselines * (len(models) > 1)}
        n = sum(p.numel() for p in ours.blocks.parameters())
        work = (2 + (stage == 2)) * B * (2 * T * n + 2 * T * T * c.width * c.depth
                                         + 2 * supervised * c.width * c.vocab)
        for name, ms in race(runs, turns=5, warm=2, flush=False).items():
            fast = speeds(work / 1e3, {"TFLOP/s": ms}, "GEMM")
            yield {"stage": stage, "what": name, "ms": ms} | ({} if isinstance(ms, str) else {
                "samples/s": 1000 * B / ms, "tokens/s": 1000 * B * T / ms, **fast,
                "GB": peak(runs[name]), "loss": losses[name]})


@torch.no_grad()
def generate():
    """Tokens a second of Llama-2-7B behind 1,024 tokens, in bf16, int8 and int4, by generate.py's
    step, launched (`ours`) and recorded, and the most that reading allows (`most`: weights and
    cache once a token, at the copy's speed)."""
    import data
    import generate
    import llama
    from kernels.quantize import quantize
    ours, theirs = llama_7b()
    c, S, new = ours.config, *pick((1024, 64), (8, 2))
    model, coded = ours, 16
    for bits, B, how in ((16, 1, {}), (16, 8, {}), (8, 1, {}), (8, 8, {}), (4, 1, {}), (4, 8, {}),
                         (16, 1, {"cache_implementation": "static"})):
        ids, row = torch.randint(c.vocab, (B, S), device=DEVICE), {"bits": bits, "batch": B, **how}
        if bits != coded:
            model, coded = ours if bits == 16 else quantize(copy.deepcopy(ours), bits), bits

        def text(length):
            theirs.generate(ids, min_new_tokens=length, max_new_tokens=length, do_sample=False,
                            pad_token_id=0, **how)

        if not how:
            cache = llama.Cache(c, B, S + 8, ours.embed.weight)
            model.hidden(ids, cache)
            step = generate.Step(model, cache, generate.Choice(model, ids.tolist(), 1), ids[:, :1],
                                 torch.full((B, 1), S, device=DEVICE))

            def token():
                cache.at.fill_(S)               # the same token every time
                cache.end.fill_(S + 1)
                step()

            token()
            runs = {"ours": token}
            if GPU:
                try:
                    runs["ours, graph"] = generate.record(token, torch.cuda.Stream()).replay
                except data.Failure as error:
                    row |= {"why": short(error), "ok": False}
            row |= {name: 1000 * B / ms if isinstance(ms, float) else ms
                    for name, ms in race(runs, turns=15, flush=False).items()}
            weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
            row["most"] = CEILING["copy"] * 1e9 * B / (
                weights - ours.embed.weight.nbytes + 2 * cache.k[:, :, :S].nbytes)
        if bits == 16:
            row["transformers"] = theirs
        if bits == 16 and not isinstance(theirs, str):  # two lengths: the prompt's time cancels
            one, more = race({n: partial(text, n) for n in (1, 1 + new)}, turns=5, warm=1,
                             flush=False).values()
            row["transformers"] = more if isinstance(more, str) else 1000 * B * new / (more - one)
        yield row


def curves():
    """50 steps on the same rows from the same weights: the loss under each optimizer."""
    import llama
    ours, torchs = kernel_files("adamw")[0].AdamW, torch.optim.AdamW
    V, C, depth, H, M = pick((8192, 1024, 8, 16, 2816), (64, 32, 2, 2, 64))
    for what, dtype, make in (
            ("torch fp32", torch.float32, torchs), ("ours", torch.bfloat16, ours),
            ("ours, stochastic", torch.bfloat16, partial(ours, stochastic=True)),
            ("torch bf16, rounded to nearest", torch.bfloat16, torchs)):
        torch.manual_seed(0)
        model = llama.Llama(llama.Config(V, C, depth, H, H, M)).to(DEVICE, dtype)
        ids = torch.randint(V, pick((16, 512), (2, 16)), device=DEVICE)
        optimizer, losses = make(model.parameters(), lr=2e-5), []
        for _ in range(pick(50, 2)):
            loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(round(float(loss.detach()), 4))
        yield {"what": what, "first": losses[0], "last": losses[-1], "losses": losses}


# ---- on a CPU ----

# Seconds are those that the one thread was running (time.thread_time): what else the machine does
# takes none of them, though it takes memory bandwidth, and of that from both alike.

def pair_of(model, *more):
    """Ours, and transformers' LLaVA with the same weights in fp32, and in each of `more`."""
    from transformers import LlavaForConditionalGeneration
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return model, *(LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype)
                        for dtype in (torch.float32, *more))


def small_llava(deep):
    """160M random weights, 256 patches: the language model of LLaMA-160M's proportions, or (deep)
    SmolLM2-135M's: 30 narrow layers, 9 heads for 3 key heads."""
    import clip
    import data
    import llama
    import projector
    size = (dict(vocab=49152, width=576, depth=30, heads=9, kv_heads=3, mlp=1536, tied=True) if deep
            else dict(vocab=32000, width=768, depth=12, heads=12, kv_heads=12, mlp=2048))
    eye = clip.ViT(clip.Config(width=512, depth=8, heads=8, mlp=2048, image=224, patch=14))
    model = projector.VLM(eye, "mlp", llama.Llama(llama.Config(**size)),
                          data.Tokenizer(ROOT / "weights/toy/llama"))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:             # loud enough that rounding decides no token
                p.normal_(0, p.shape[-1] ** -.5)
        model.llm.embed.weight.normal_()
    return model.eval()


def written(generate, model, ids, pixels, new):
    """Tokens (B, new) of ours, and the second at which each column was there."""
    times, rows = [], [[] for _ in pixels]
    for step in generate.decode(model, [ids] * len(rows), list(pixels[:, None]), new, eos=-1):
        if any(step):                   # the last has nothing left to say
            times.append(time.thread_time())
        for row, some in zip(rows, step):
            row += some
    return rows, times


def cpu_generate():
    """Greedy tokens a second of a random 160M LLaVA, one thread: `written` from the first token on,
    `whole` with picture and prompt. In fp32 the tokens must be the same. Where the CPU multiplies
    bf16, both in bf16 too: `same` is the share of tokens that are their own in fp32."""
    import data
    import generate
    from kernels.quantize import fast_bf16
    from transformers import LogitsProcessor, LogitsProcessorList

    class Clock(LogitsProcessor):
        def __init__(self):
            self.times = []

        def __call__(self, ids, scores):
            self.times.append(time.thread_time())
            return scores

    words, new = [1, *range(300, 310)], 64
    half = [torch.bfloat16] if fast_bf16() else []

    def our(model, pixels):
        return written(generate, model, words + [data.IMAGE] + words[1:], pixels, new)

    def their(model, pixels):
        spread, clock = words + [image] * patches + words[1:], Clock()
        rows = torch.tensor([spread] * len(pixels))
        out = model.generate(
            input_ids=rows, attention_mask=torch.ones_like(rows), max_new_tokens=new,
            pixel_values=pixels.to(model.dtype), min_new_tokens=new, do_sample=False,
            pad_token_id=0, eos_token_id=None, logits_processor=LogitsProcessorList([clock]))
        return out[:, len(spread):].tolist(), clock.times

    for deep in (False, True):
        ours, *theirs = pair_of(small_llava(deep), *half)
        image, patches, kinds = ours.image_token, ours.patches, ["", " bf16"][:1 + len(half)]
        mine = [copy.deepcopy(ours).to(dtype) for dtype in half]
        runs = {}
        for kind, model, other in zip(kinds, (ours, *mine), theirs):
            runs["ours" + kind] = partial(our, generate.ready(model))
            runs["transformers" + kind] = partial(their, other)
        for B, turns in ((1, 5), (8, 2)):
            pixels, found, said = torch.randn(B, 3, 224, 224), {name: [] for name in runs}, {}
            for _ in range(turns):
                for name, run in runs.items():
                    start = time.thread_time()
                    said[name], times = run(pixels)
                    found[name].append((time.thread_time() - start, times))
            row = {"what": "30 layers of 576" if deep else "12 layers of 768", "batch": B}
            for name, took in found.items():
                row |= {f"{name} written": B * (new - 1) / statistics.median(
                            t[-1] - t[0] for _, t in took),
                        f"{name} whole": B * new / statistics.median(all for all, _ in took)}
            for kind in kinds:
                for what in ("written", "whole"):
                    row[f"times{kind}, {what}"] = (row[f"ours{kind} {what}"]
                                                   / row[f"transformers{kind} {what}"])
            for who in ("ours", "transformers") if half else ():
                pairs = [*zip(sum(said[who], []), sum(said[who + " bf16"], []))]
                row[f"{who} bf16 same"] = sum(a == b for a, b in pairs) / len(pairs)
            yield row | {"ok": said["ours"] == said["transformers"]}
        del ours, mine, theirs, runs
        gc.collect()


def cpu_step():
    """Training steps of the toy's two stages (its own samples and batches, fp32, fused AdamW),
    padded as the toy trains and packed into one row, beside the same model under transformers with
    the same batch, padded. The losses must be the same before and after the first update; later
    AdamW makes much of differences of rounding."""
    import data
    import projector
    from train import toy_sample
    toy = ROOT / "weights/toy"
    for stage, B, told, template, trains in (
            (1, 16, "captions", "plain", lambda name: "bridge." in name or "projector." in name),
            (2, 12, "dialogue", "v1", lambda name: "vision" not in name)):
        ours, theirs = pair_of(projector.VLM.from_parts(toy / "clip", toy / "llama"))
        models = {"packed": ours, "padded": copy.deepcopy(ours), "transformers": theirs.train()}
        adam = {}
        for name, model in models.items():
            for key, p in model.named_parameters():
                p.requires_grad_(trains(key))
            adam[name] = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad],
                                           lr=1e-4, fused=True)

        def batch(number):
            """What each of the three reads: {name: its loss}."""
            shown, talks = zip(*(toy_sample(0, stage, number * B + i, told) for i in range(B)))
            pixels = torch.cat([data.preprocess(p, ours.image_size, "pad") for p in shown])
            texts = [data.encode(talk, template, ours.words, 1) for talk in talks]
            at = [ids.index(data.IMAGE) for ids, _ in texts]
            fill = lambda rows, value: torch.nn.utils.rnn.pad_sequence(
                list(map(torch.tensor, rows)), batch_first=True, padding_value=value)
            spliced = lambda side, what: [
                text[side][:i] + [what] * ours.patches + text[side][i + 1:]
                for text, i in zip(texts, at)]
            ids, labels = (list(side) for side in zip(*texts))
            wide, aims = spliced(0, ours.image_token), spliced(1, data.IGNORE)
            line = lambda rows: torch.tensor([sum(rows, [])])
            return {"packed": lambda: ours.loss(line(ids), line(labels), pixels,
                                                lengths=list(map(len, ids))),
                    "padded": lambda: models["padded"].loss(
                        fill(ids, 0), fill(labels, data.IGNORE), pixels,
                        fill([[True] * len(i) for i in ids], False)),
                    "transformers": lambda: theirs(
                        input_ids=fill(wide, 0), labels=fill(aims, data.IGNORE),
                        attention_mask=fill([[1] * len(i) for i in wide], 0),
                        pixel_values=pixels).loss}

        took, losses = {name: [] for name in models}, {name: [] for name in models}
        for turn in range(10):
            for name, pull in batch(turn).items():
                start = time.thread_time()
                loss = pull()
                loss.backward()
                adam[name].step()
                adam[name].zero_grad()
                took[name] += [time.thread_time() - start] * (turn > 0)
                losses[name].append(float(loss.detach()))
        fast = {name: B / statistics.median(t) for name, t in took.items()}
        yield {"what": f"toy, stage {stage}",
               **{f"{name} samples/s": x for name, x in fast.items()},
               "times": fast["packed"] / fast["transformers"],
               "times, padded": fast["padded"] / fast["transformers"],
               "first loss": losses["padded"][0],
               "ok": all(max(x) - min(x) < 1e-4 * min(x)
                         for x in zip(*(some[:2] for some in losses.values())))}


@torch.no_grad()
def cpu_quantize():
    """The toy language model with weights in int8 and int4: perplexity of 200 descriptions of
    scenes it was not trained on, and at how many places the likeliest token is still the same."""
    import data
    import llama
    import world
    from kernels.quantize import quantize
    toy, first = ROOT / "weights/toy/llama", None
    words = data.Tokenizer(toy)
    rows = [torch.tensor([words.encode(world.description(world.scene(i, "test")))])
            for i in range(200)]
    for what in ("fp32", "int8", "int4"):
        model = llama.Llama.from_pretrained(toy, torch.float32)
        if what != "fp32":
            quantize(model, int(what[3:]))
        logits = [model(row)[0, :-1] for row in rows]
        loss = statistics.fmean(float(F.cross_entropy(x, row[0, 1:]))
                                for x, row in zip(logits, rows))
        best = torch.cat([x.argmax(-1) for x in logits])
        first = best if first is None else first
        yield {"what": what, "perplexity": math.exp(loss), "same token": float(
            (best == first).float().mean()), "places": len(best)}


# seconds of each; what compiles longest comes last
TABLES = {ceilings: 15, correctness: 60, attention: 100, elementwise: 60, head: 25, decode: 25,
          optimizer: 30, curves: 25, generate: 80, step: 120}

ON_CPU = {cpu_step: 600, cpu_quantize: 60, cpu_generate: 3000}

if __name__ == "__main__":
    ask = argparse.ArgumentParser(description="the kernels against what people use")
    ask.add_argument("tables", nargs="*", help=", ".join(t.__name__ for t in TABLES))
    ask.add_argument("--cpu", action="store_true", help="on one core, beside transformers")
    ask.add_argument("--rehearse", action="store_true", help="toy sizes, on a CPU too")
    ask.add_argument("--out", type=Path, default=ROOT / "kernels/results")
    asked = ask.parse_args()
    TABLES = ON_CPU if asked.cpu else TABLES
    if unknown := set(asked.tables) - {t.__name__ for t in TABLES}:
        ask.error(f"no table {', '.join(sorted(unknown))}")
    if asked.cpu:
        torch.set_num_threads(1)
    elif not GPU and not asked.rehearse:
        print("No GPU here: nothing is timed. What the compiler makes of the kernels:", flush=True)
        sys.exit(subprocess.run([sys.executable, ROOT / "tests/compiled.py"]).returncode)
    sys.path.insert(0, str(ROOT))               # llama.py lies there
    machine = {"device": "one core of a CPU" if asked.cpu else
               torch.cuda.get_device_name() if GPU else "a CPU, rehearsal",
               "torch": torch.__version__}
    print(*machine.values())
    asked.out.mkdir(parents=True, exist_ok=True)
    results = [report(table, seconds, asked.out, machine) for table, seconds in TABLES.items()
               if not asked.tables or table is ceilings or table.__name__ in asked.tables]
    sys.exit(not all(results))
