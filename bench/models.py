"""bench/models.py: a step of training and generation at 7B, beside transformers."""

import copy
from functools import partial

import torch
import torch.nn.functional as F

from bench.kernels import kernel_files
from bench.measure import (
    CEILING,
    compiled,
    DEVICE,
    FAILURES,
    GPU,
    HALF,
    peak,
    pick,
    race,
    random,
    short,
    speeds,
)
from decoding.cuda_graph import capture, DecodeStep
from formats.checkpoints import export
from formats.errors import UserError
from formats.names import fused_rows


def llama_7b():
    """Ours with random weights, and transformers' on the very same memory, or why not."""
    import llama
    from formats import configs
    tiny = {"vocab": 100, "width": 32, "depth": 2, "heads": 2, "kv_heads": 2, "mlp": 64}
    config = llama.Config(**pick({}, tiny))
    torch.set_default_dtype(HALF)
    try:
        with torch.device(DEVICE):
            ours = llama.Llama(config)
            from transformers import LlamaConfig, LlamaForCausalLM
            theirs = LlamaForCausalLM(LlamaConfig(**configs.llama_to_hf(config), attn_implementation="sdpa"))
        theirs.load_state_dict(export(ours, ours.names(), fused_rows(config)), assign=True)
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
        table = rot.rope_table(torch.arange(T, device=DEVICE)[None], c.head_dim, c.rope_theta)

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
            cache = llama.KVCache(c, B, S + 8, ours.embed.weight)
            model.hidden(ids, cache)
            step = DecodeStep(model, cache, generate.Sampler(model, ids.tolist(), 1), ids[:, :1],
                                 torch.full((B, 1), S, device=DEVICE))

            def token():
                step.cache.at.fill_(S)          # the same token every time
                step.cache.end.fill_(S + 1)
                step()

            token()
            runs = {"ours": token}
            if GPU:
                try:
                    runs["ours, graph"] = capture(token, torch.cuda.Stream()).replay
                except UserError as error:
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
