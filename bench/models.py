"""bench.models: a training step and generation at 7B, beside transformers on the same weights."""

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
from decoding.cuda_graph import DecodeStep, capture
from formats import configs, names
from formats.checkpoints import export
from formats.errors import UserError
from generate import Sampler
from kernels.quantize import quantize
from llama import Config, KVCache, Llama


def llama_7b():
    """Ours with random weights, and transformers' on the very same memory, or why not."""
    tiny = {"vocab": 100, "width": 32, "depth": 2, "heads": 2, "kv_heads": 2, "mlp": 64}
    config = Config(**pick({}, tiny))
    torch.set_default_dtype(HALF)
    try:
        with torch.device(DEVICE):
            ours = Llama(config)
            from transformers import LlamaConfig, LlamaForCausalLM
            hf_config = LlamaConfig(**configs.llama_to_hf(config), attn_implementation="sdpa")
            reference = LlamaForCausalLM(hf_config)
        weights = export(ours, names.LLAMA, names.fused_rows(config))
        reference.load_state_dict(weights, assign=True)
    except FAILURES as error:
        reference = short(error)
    finally:
        torch.set_default_dtype(torch.float32)
    return ours, reference


def step_runs(ours, reference, B, T, supervised, compiling, losses):
    """{what: function that runs forward and backward once, and notes its loss in `losses`}."""
    rot, checkpoint, ce = kernel_files("rope", "checkpoint", "cross_entropy")
    c, models = ours.config, [ours] if reference is None else [ours, reference]
    x = random(B, T, c.width, grad=True)
    labels = torch.randint(c.vocab, (B, T), device=DEVICE)
    labels[:, :T - supervised] = -100
    targets = F.pad(labels[:, 1:], (0, 1), value=-100).reshape(-1)
    table = rot.rope_table(torch.arange(T, device=DEVICE)[None], c.head_dim, c.rope_theta)

    def backward(name, loss):
        loss.backward()
        losses[name] = round(float(loss.detach()), 4)
        x.grad = None
        for model in models:
            model.zero_grad()

    def our_step(name, policy):
        y = ours.norm(checkpoint.checkpointed(ours.blocks, x, *table, policy=policy))
        backward(name, ce.linear_cross_entropy(y.view(-1, c.width), ours.head.weight, targets))

    def reference_step(name, checkpointing, model):
        if checkpointing:
            reference.gradient_checkpointing_enable()
        else:
            reference.gradient_checkpointing_disable()
        backward(name, model(inputs_embeds=x, labels=labels, use_cache=False).loss)

    runs = {}
    if not compiling:
        for policy in (None, "none", "attention", "full"):
            runs[f"ours {policy}"] = partial(our_step, f"ours {policy}", policy)
    if reference is not None and compiling:
        name = "transformers compile"
        runs[name] = partial(reference_step, name, False, compiled(reference))
    elif reference is not None:
        for name, checkpointing in (("transformers", False), ("transformers checkpoint", True)):
            runs[name] = partial(reference_step, name, checkpointing, reference)
    return runs


def step_operations(model, stage, B, T, supervised):
    """Floating-point operations of the model's own products; checkpointing's are not counted."""
    c, n = model.config, sum(p.numel() for p in model.blocks.parameters())
    passes = 3 if stage == 2 else 2         # stage 1: forward, and gradients of the inputs only
    return passes * B * (2 * T * n + 2 * T * T * c.width * c.depth
                         + 2 * supervised * c.width * c.vocab)


def step():
    """Llama-2-7B forward and backward in LLaVA's stages 2 (all trained) and 1 (frozen, gradients
    for the pictures' vectors): full rows for all, TFLOP/s of the model's own operations, GB above
    the weights. transformers runs on the same weights: its loss must be ours."""
    ours, reference = llama_7b()
    if isinstance(reference, str):
        yield {"what": "transformers", "ms": reference}
        reference = None
    else:
        reference.train()
    # compiling takes minutes: last, so that it can be cut off
    for stage, size, compiling in ((2, (9, 900, 180), False), (1, (13, 606, 28), False),
                                   (2, (9, 900, 180), True)):
        B, T, supervised = pick(size, (2, 12, 3))
        for model in (ours, reference):
            if model is not None:
                model.requires_grad_(stage == 2)
        losses = {}
        runs = step_runs(ours, reference, B, T, supervised, compiling, losses)
        work = step_operations(ours, stage, B, T, supervised)
        for name, ms in race(runs, turns=5, warm=2, flush=False).items():
            row = {"stage": stage, "what": name, "ms": ms}
            if not isinstance(ms, str):
                row |= {"samples/s": 1000 * B / ms, "tokens/s": 1000 * B * T / ms,
                        **speeds(work / 1e3, {"TFLOP/s": ms}, "GEMM"),
                        "GB": peak(runs[name]), "loss": losses[name]}
            yield row


@torch.no_grad()
def generate():
    """Tokens a second of Llama-2-7B behind 1,024 tokens, in bf16, int8 and int4, by generate.py's
    step, launched (`ours`) and recorded, and the most that reading allows (`most`: weights and
    cache once a token, at the copy's speed)."""
    ours, reference = llama_7b()
    c, S, new = ours.config, *pick((1024, 64), (8, 2))
    model, coded = ours, 16
    for bits, B, how in ((16, 1, {}), (16, 8, {}), (8, 1, {}), (8, 8, {}), (4, 1, {}), (4, 8, {}),
                         (16, 1, {"cache_implementation": "static"})):
        ids, row = torch.randint(c.vocab, (B, S), device=DEVICE), {"bits": bits, "batch": B, **how}
        if bits != coded:
            model, coded = ours if bits == 16 else quantize(copy.deepcopy(ours), bits), bits

        def text(length):
            reference.generate(ids, min_new_tokens=length, max_new_tokens=length, do_sample=False,
                            pad_token_id=0, **how)

        if not how:
            cache = KVCache(c, B, S + 8, ours.embed.weight)
            model.hidden(ids, cache)
            step = DecodeStep(model, cache, Sampler(model, ids.tolist(), 1), ids[:, :1],
                                 torch.full((B, 1), S, device=DEVICE))

            def token():
                step.cache.at.fill_(S)         # the same token every time
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
            row["transformers"] = reference
        if bits == 16 and not isinstance(reference, str):  # two lengths: the prompt's time cancels
            one, more = race({n: partial(text, n) for n in (1, 1 + new)}, turns=5, warm=1,
                             flush=False).values()
            row["transformers"] = more if isinstance(more, str) else 1000 * B * new / (more - one)
        yield row
