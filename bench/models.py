"""bench.models: a training step and generation at 7B, beside transformers on the same weights."""

import copy
from functools import partial

import torch
import torch.nn.functional as F

from bench.correctness import kernel_file
from bench.measure import (
    attempt,
    CEILING,
    DEVICE,
    Failed,
    FAILURES,
    GPU,
    HALF,
    pick,
    race,
    random,
    short,
    speeds,
    worker,
)
from decoding.cuda_graph import capture, DecodeStep
from formats import configs, names
from formats.checkpoints import export
from generate import Sampler
from kernels.adamw import AdamW
from kernels.quantize import quantize
from llama import Config, KVCache, Llama

CARD = 80 * 2 ** 30 * 79.1 / 80         # bytes that an A100 of 80 GB shows a process


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


# --------------------------------------------------------------------------- a training step

class Steps:
    """One training step of one batch of full rows, in ours and in transformers'.

    Stage 2 trains all weights: forward, backward, AdamW at a rate of 0, so that every candidate
    meets the same weights and must have the same loss. Stage 1 trains none of the LLaMA: forward,
    and the gradient of the pictures' vectors."""

    def __init__(self, ours, reference, stage, B, T, supervised):
        self.ours, self.reference, self.stage = ours, reference, stage
        c = ours.config
        self.x = random(B, T, c.width, grad=True)
        self.labels = torch.randint(c.vocab, (B, T), device=DEVICE)
        self.labels[:, :T - supervised] = -100
        self.targets = F.pad(self.labels[:, 1:], (0, 1), value=-100).reshape(-1)
        self.table = kernel_file("rope").rope_table(torch.arange(T, device=DEVICE)[None],
                                                    c.head_dim, c.rope_theta)
        self.optimizer, self.loss = None, None

    def models(self):
        return [m for m in (self.ours, self.reference) if isinstance(m, torch.nn.Module)]

    def clean(self):
        """Nothing stays of a candidate, whether it ran or not."""
        self.x.grad = self.optimizer = None
        for model in self.models():
            model.zero_grad(set_to_none=True)

    def begin(self, name):
        """The state of AdamW: ours in 8 bits with low halves, theirs in bf16."""
        for model in self.models():
            model.requires_grad_(self.stage == 2)
        if self.stage == 2 and name.startswith("ours"):
            self.optimizer = AdamW(self.ours.parameters(), lr=0.0, weight_decay=0.0)
        elif self.stage == 2:
            self.optimizer = torch.optim.AdamW(self.reference.parameters(), lr=0.0,
                                               weight_decay=0.0, fused=True)

    def end(self, loss):
        loss.backward()
        self.loss, self.x.grad = float(loss.detach()), None
        if self.optimizer:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def step_ours(self, policy):
        checkpointed = kernel_file("checkpoint").checkpointed
        y = self.ours.norm(checkpointed(self.ours.blocks, self.x, *self.table, policy=policy))
        self.end(kernel_file("cross_entropy").linear_cross_entropy(
            y.view(-1, y.shape[-1]), self.ours.head.weight, self.targets))

    def step_theirs(self, checkpointing):
        if isinstance(self.reference, str):
            raise Failed(self.reference)
        if checkpointing:
            self.reference.gradient_checkpointing_enable()
        else:
            self.reference.gradient_checkpointing_disable()
        self.end(self.reference(inputs_embeds=self.x, labels=self.labels, use_cache=False).loss)

    def operations(self):
        """Floating-point operations of the model's own products; checkpointing's do not count."""
        c, n = self.ours.config, sum(p.numel() for p in self.ours.blocks.parameters())
        B, T, _ = self.x.shape
        supervised = int((self.targets != -100).sum())
        passes = 3 if self.stage == 2 else 2
        return passes * (2 * B * T * n + 2 * B * T * T * c.width * c.depth
                         + 2 * supervised * c.width * c.vocab)


def step_row(steps, name, run):
    """Milliseconds, rates and the peak of memory of one candidate."""
    try:
        attempt(name, partial(steps.begin, name), steps.clean)
        if GPU:
            torch.cuda.reset_peak_memory_stats()
        ms = race({name: run}, turns=3, warm=2, flush=False, clean=steps.clean)[name]
    except Failed as why:
        ms = str(why)
    loss = steps.loss
    steps.clean()
    if isinstance(ms, str):
        # without checkpointing a step need not fit; with it, it has to
        expected = name == "ours" and ms == "OOM"
        return {"ok": True, "memory": ms} if expected else {name: ms}
    B, T, _ = steps.x.shape
    fast = speeds(steps.operations() / 1e3, {"TFLOP/s": ms}, "GEMM")
    memory = {"GB": round(torch.cuda.max_memory_allocated() / 1e9, 1)} if GPU else {}
    return {"ms": ms, "samples/s": 1000 * B / ms, "tokens/s": 1000 * B * T / ms, **fast, **memory,
            "loss": round(loss, 4)}


def step():
    """Llama-2-7B in LLaVA's stages 2 and 1, each within the memory of an 80 GB card."""
    if GPU:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1., CARD / total))
    ours, reference = llama_7b()
    if not isinstance(reference, str):
        reference.train()
    # the row that says most comes first: what is behind it may be cut off
    plan = ((2, (9, 900, 180), ("ours, none", "theirs, checkpointing", "ours, attention")),
            (1, (13, 606, 28), ("ours, none", "theirs, checkpointing", "ours", "theirs")),
            (2, (9, 900, 180), ("ours, full", "ours", "theirs")))
    for stage, size, chosen in plan:
        steps = Steps(ours, reference, stage, *pick(size, (2, 12, 3)))
        for what in chosen:
            kind, _, policy = what.partition(", ")
            if kind == "ours":
                name, run = what, partial(steps.step_ours, policy or None)
            else:
                name = what.replace("theirs", "transformers")
                run = partial(steps.step_theirs, policy == "checkpointing")
            yield f"stage {stage}, {name}", partial(step_row, steps, name, run)


# -------------------------------------------------------------------------------- generation

def generate():
    """Tokens a second of Llama-2-7B behind 1,024 tokens, in bf16, int8 and int4, by generate.py's
    step, launched (`ours`) and recorded, and the most that reading allows (`most`: weights and
    cache once a token, at the copy's speed)."""
    ours, reference = llama_7b()
    coded = {16: ours}

    def model(bits):
        if bits not in coded:
            coded[bits] = quantize(copy.deepcopy(ours), bits)
        return coded[bits]

    for bits, B in ((16, 1), (8, 1), (4, 1), (16, 8), (8, 8), (4, 8)):
        yield f"{bits} bits, batch {B}", lambda: token_row(model(bits), ours, B)
    for B, how in ((1, {}), (8, {}), (1, {"cache_implementation": "static"})):
        about = ", static cache" if how else ""
        yield f"transformers, batch {B}{about}", partial(reference_row, reference, ours, B, how)


@torch.no_grad()
def token_row(model, ours, B):
    """Tokens a second of one step, over and over: launched, and as a CUDA graph."""
    c, S = ours.config, pick(1024, 8)
    ids = torch.randint(c.vocab, (B, S), device=DEVICE)
    cache = KVCache(c, B, S + 8, ours.embed.weight)
    runs, step = {}, []

    def prompt():
        model.hidden(ids, cache)
        step.append(DecodeStep(model, cache, Sampler(model, ids.tolist(), 1), ids[:, :1],
                               torch.full((B, 1), S, device=DEVICE)))

    def token():
        step[0].cache.at.fill_(S)               # the same token every time
        step[0].cache.end.fill_(S + 1)
        step[0]()

    try:
        attempt("ours", prompt)
        attempt("ours", token)
    except Failed as why:
        return {"ours": str(why)}
    runs["ours"] = token
    row = {}
    if GPU:
        try:
            runs["ours, graph"] = attempt("ours, graph", lambda: capture(
                token, torch.cuda.Stream())).replay
        except Failed as why:
            row["ours, graph"] = str(why)
    for name, ms in race(runs, turns=15, flush=False).items():
        row[name] = 1000 * B / ms if isinstance(ms, float) else ms
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    read = weights - ours.embed.weight.nbytes + 2 * cache.k[:, :, :S].nbytes
    return {**row, "most": CEILING["copy"] * 1e9 * B / read}


def reference_row(reference, ours, B, how):
    """Tokens a second of transformers' generate: of two lengths, so that the prompt's time cancels
    out."""
    if isinstance(reference, str):
        return {"transformers": reference}
    S, new = pick((1024, 64), (8, 2))
    ids = torch.randint(ours.config.vocab, (B, S), device=DEVICE)

    def text(length):
        reference.generate(ids, min_new_tokens=length, max_new_tokens=length, do_sample=False,
                           pad_token_id=0, **how)
    found = race({f"transformers {n}": partial(text, n) for n in (1, 1 + new)}, turns=3, warm=1,
                 flush=False)
    if any(isinstance(ms, str) for ms in found.values()):
        return found
    one, more = found.values()
    return {"transformers": 1000 * B * new / (more - one)}
