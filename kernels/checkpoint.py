"""kernels/checkpoint.py: activations are kept or made again; which, is a choice of memory or time.

Backward needs what forward made. Autograd keeps it: each operation saves its inputs or its result.
Gradient checkpointing keeps less and computes the rest a second time.       [Chen] 1604.06174

One idea, the region: a function whose inputs are kept and which runs again when backward first asks
for something it saved. In the first run every tensor that autograd saves is replaced by a number;
the second run saves the same tensors in the same order, so the number finds its tensor. The graph
is the one that autograd would have made anyway, with the same sums in the same order: gradients are
equal to the last bit under every policy.

    policy       regions                           kept of a layer            runs again in backward
    None         none at all                       everything                 nothing
    none         each norm, each activation        what the GEMMs made        norms and products
    attention    each layer; attention is spared   its input, attention's     its GEMMs but the last
                                                   output and log-sum-exp
    full         segments of about √n layers,      one input for the whole    the segment, then each
                 and `attention` inside them       segment                    layer as above

Attention is spared by borrowing. The graph of its one run stays, but of what that graph saved only
the rest is kept, output and log-sum-exp; q, k and v come from the layer's second run when attention
runs backward. Nothing is asked of the attention function but that it can be differentiated.

What it costs: Llama-2-7B (n = 32, C = 4096, F = 11008, 202 M weights a layer), bf16, 8,192 tokens.
Computed, not measured. KiB of a token and a layer; GB of all tokens and layers, 1 GB = 10⁹ bytes.

    policy       kept, KiB                                             kept     while a layer runs
    None         all: 91 + both norms 16 + product 21.5 = 128.5     34.5 GB
    none         x 8, q k v 24, o 8, h 8, gate and up 43    =  91   24.4 GB     0.2 GB  one product
    attention    x 8, o 8, log-sum-exp 1/8                  =  16    4.3 GB     0.9 GB  layer: 112.5
    full         x 8 in 6 of 32 layers                      = 1.5    0.4 GB     1.7 GB  6·16 + 112.5
    attention, offloaded: two layers' on the GPU            =   1    0.3 GB     0.9 GB  layer: 112.5

    policy       work in passes through all GEMMs (backward is 2)                     of policy None
    none         1 + 2                                                                     1.00 x
    attention    1 + 2 + 0.78     without `down`, whose result nobody saved: 157 of 202 M  1.26 x
    full         1 + 2 + 1 + 0.78                                                          1.59 x

So `none` comes first: what fits into memory should not be computed twice. And a segment that would
not hold to `attention` inside would save all of its 6 layers at once in backward, 6 · 128.5 KiB
= 6.5 GB: more than `attention` takes for all 32.

offload (offload.py) sends what regions keep to pinned host memory on a stream of its own, and
fetches it back one region ahead. `attention` sends 135 MB a layer: 5.4 ms at 25 GB/s of PCIe,
beside a layer's forward of 3.3 TFLOP, 10.6 ms at an A100's 312 TFLOP/s. Computed; not run by us.

A region must do the same in both runs. Random numbers are not put back to where they were, because
no model here draws any: dropout in training is refused (F.dropout inside a function is not seen).
A KV cache would remember the first run. And one backward a forward: attention's own graph is gone
after the first, so retain_graph fails with PyTorch's own message.

A model takes part by calling `checkpointed` in place of its loop over layers. What a region should
know of attention and of quick functions it learns from `keep_output` and `recompute`, put around
them once.

Alone: `python -m kernels.checkpoint` prints bytes kept and time of a small stack under each policy.
Next: kernels/adamw.py, the optimizer's share of the memory.
"""

import contextlib
import functools
import math
import threading
import weakref

import torch
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks

from kernels.offload import hosting

POLICIES = (None, "none", "attention", "full")


class Here(threading.local):
    """Which region of this thread spares its attention, and which ledger wants to know of what is
    cheap. Thread by thread: PyTorch runs backward on a GPU in a thread of its own."""
    sparing = None
    ledger = None

    @contextlib.contextmanager
    def __call__(self, sparing=None, ledger=None):
        outside = self.sparing, self.ledger
        self.sparing, self.ledger = sparing, ledger
        try:
            yield
        finally:
            self.sparing, self.ledger = outside


here = Here()


# ------------------------------------------------------------------------------- what is kept

class Keep(torch.autograd.Function):
    """A node that holds a tensor where saved_tensors_hooks further out get to see it: to count it,
    to move it to the host, or to give it a number, as a region does with another one inside."""

    @staticmethod
    def forward(ctx, anchor, x):
        ctx.save_for_backward(x)
        return anchor.detach()


class Slot:
    """One kept tensor: in hand while its region runs, in a node of its own from then on."""

    def __init__(self, x):
        self.x, self.node = x.detach(), None

    def seal(self, host=None):
        """Put it into a node; `host` says how to put it elsewhere and returns a handle with get."""
        anchor = torch.empty(0, requires_grad=True)         # without one there would be no node
        with saved_tensors_hooks(host, fetched) if host else contextlib.nullcontext():
            self.node, self.x = Keep.apply(anchor, self.x).grad_fn, None
        return self

    def get(self):
        return self.x if self.node is None else self.node.saved_tensors[0]


class View:
    """A tensor as a cut out of another one's memory, which `source.get()` brings."""

    def __init__(self, x, base, source):
        self.source, self.shape, self.stride = source, x.shape, x.stride()
        self.shift = x.storage_offset() - base.storage_offset()

    def get(self):
        base = self.source.get()
        return base.as_strided(self.shape, self.stride, base.storage_offset() + self.shift)


def fetched(handle):
    return handle.get()


class Ledger:
    """Hooks that save a tensor as a view of something that can be had later, or else keep it."""

    def __init__(self, sources=()):
        self.sources = [(weakref.ref(base), source) for base, source in sources]
        self.slots = []

    def pack(self, x):
        place = x.untyped_storage().data_ptr(), x.dtype
        for alive, source in self.sources:
            base = alive()              # the memory of one that is gone may have become another's
            if base is not None and (base.untyped_storage().data_ptr(), base.dtype) == place:
                return View(x, base, source)
        slot = Slot(x)
        self.slots.append(slot)
        # what covers its memory whole can stand for every other view of it, moved away or not
        if x.numel() * x.element_size() == x.untyped_storage().nbytes():
            self.sources.append((weakref.ref(slot.x), slot))
        return slot

    def hooks(self):
        return saved_tensors_hooks(self.pack, fetched)

    def close(self):
        """The slots, forgotten here: what was saved holds on to its hooks and so to the ledger."""
        slots, self.sources, self.slots = self.slots, [], []
        return slots


# ----------------------------------------------------------------------------- what runs again

class Enough(Exception):
    """The second run has met the last tensor that the first one saved."""


class Made:
    """The number that stands for a tensor of a region."""

    def __init__(self, region, number):
        self.region, self.number = region, number

    def get(self):
        if self.region.made is None:
            self.region.again()
        return self.region.made[self.number]


class Region:
    """A function that runs a second time when backward asks for what it saved in the first.

    spare: attention inside runs once. serve: the result too can be asked for, by the last number.
    host: how to put what is kept elsewhere. before: the region whose turn comes next in backward.

    Handles hold the region and the region holds no graph, so it goes as soon as its last node has
    run, and with it all that it kept or made."""

    def __init__(self, function, spare=False, serve=False, host=None, before=None):
        self.function, self.spare, self.serve = function, spare, serve
        self.host, self.before, self.away = host, before, []
        self.count, self.made = 0, None
        self.attended, self.slots, self.replay = [], [], None

    def number(self, x):
        self.count += 1
        return Made(self, self.count - 1)

    def put(self, x):
        self.away.append(self.host(x))
        return self.away[-1]

    def __call__(self, *args):
        """The first run."""
        kind = next((a.device.type for a in args if torch.is_tensor(a)), "cpu")
        self.cast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        with here(self if self.spare else None), saved_tensors_hooks(self.number, fetched):
            out = self.function(*args)
        if self.count or self.serve:
            # the first argument is what differs from region to region; tables and masks are shared
            self.args = [(Slot(a).seal(self.put if self.host and i == 0 else None), a.requires_grad)
                         if torch.is_tensor(a) else (None, a) for i, a in enumerate(args)]
            for slot in self.slots:
                slot.seal(self.put if self.host else None)
        return out

    def again(self):
        """The second run: the same operations in the same order, so the same numbers."""
        args = [value if slot is None else slot.get().detach().requires_grad_(value)
                for slot, value in self.args]
        for handle in self.before.away if self.before else ():
            handle.fetch()                          # on its way while this region is at work
        made = []

        def pack(x):
            made.append(x.detach())
            if len(made) == self.count and not self.serve:
                raise Enough                        # of a LLaMA layer this spares the last GEMM
            return len(made) - 1

        self.replay = iter(self.attended)
        kind, dtype, enabled = self.cast
        try:
            with torch.enable_grad(), torch.autocast(kind, dtype, enabled), here(
                    self if self.spare else None), saved_tensors_hooks(pack, made.__getitem__):
                out = self.function(*args)
            made += [out.detach()] if self.serve else []
        except Enough:
            pass
        finally:
            self.replay = None
        if len(made) != self.count + self.serve:
            raise RuntimeError(f"checkpoint: of {self.count} tensors saved in the first run the "
                               f"second made {len(made) - self.serve}; what runs must do the same "
                               "both times: no dropout, no cache")
        self.made = made

    def attend(self, attention, q, k, v, rest, named):
        """Attention inside: the first run keeps its graph and result, the second returns that."""
        if not any(t.requires_grad for t in (q, k, v)):
            return attention(q, k, v, *rest, **named)
        if self.replay is not None:
            return Attend.apply(Call(next(self.replay).get()), q, k, v)
        anchor, loans = torch.empty(0, requires_grad=True), [Loan() for _ in range(3)]
        inside = [Enter.apply(anchor, t.detach()) if t.requires_grad else t.detach()
                  for t in (q, k, v)]
        ledger = Ledger(zip(inside, loans))
        with here(), ledger.hooks():
            out = attention(*inside, *rest, **named)
            handle = ledger.pack(out)
        if isinstance(getattr(handle, "source", None), Loan):       # v itself, say: lent no longer
            handle = Slot(out)                                      # when the second run asks
            ledger.slots.append(handle)
        self.attended.append(handle)
        self.slots += ledger.close()
        ways = [get_gradient_edge(t) for t in inside if t.requires_grad]
        return Attend.apply(Call(out, get_gradient_edge(out), ways, loans), q, k, v)


# ------------------------------------------------------------------------ attention runs once

class Loan:
    """q, k or v for the time of attention's backward."""
    x = None

    def get(self):
        return self.x


class Call:
    """One call of attention: its result, the two ends of its graph, and what that borrows."""

    def __init__(self, out, end=None, ways=(), loans=()):
        self.out, self.end, self.ways, self.loans = out.detach(), end, ways, loans


class Enter(torch.autograd.Function):
    """Where attention's own graph begins. A leaf would do, but a graph keeps its leaves."""

    @staticmethod
    def forward(ctx, anchor, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return None, grad


class Attend(torch.autograd.Function):
    """Attention's own graph, as one node of the layer's."""

    @staticmethod
    def forward(ctx, call, q, k, v):
        ctx.call = call
        ctx.save_for_backward(q, k, v)              # by number: a region is running
        out, call.out = call.out, None
        return out

    @staticmethod
    def backward(ctx, grad):
        call = ctx.call
        for loan, x in zip(call.loans, ctx.saved_tensors):
            loan.x = x
        grads = iter(torch.autograd.grad([call.end], call.ways, [grad], allow_unused=True))
        for loan in call.loans:
            loan.x = None
        return None, *(next(grads) if needed else None for needed in ctx.needs_input_grad[1:])


def keep_output(attention):
    """attention(q, k, v, ...), made known to regions that spare it."""
    @functools.wraps(attention)
    def known(q, k, v, *rest, **named):
        if here.sparing is None:
            return attention(q, k, v, *rest, **named)
        return here.sparing.attend(attention, q, k, v, rest, named)
    return known


def recompute(function):
    """function(*tensors and numbers) -> tensor, made known as quicker to run than to remember.

    Called with named arguments it is left alone: rms_norm(..., residual=r) has two results, and to
    run it again two inputs would have to be kept in place of one sum."""
    @functools.wraps(function)
    def known(*args, **named):
        ledger = here.ledger
        if ledger is None or named:
            return function(*args, **named)
        region = Region(function, serve=True)
        out = region(*args)
        ledger.sources.append((weakref.ref(out), Made(region, region.count)))
        return out
    return known


# ---------------------------------------------------------------------------- what a model calls

def checkpointed(blocks, x, *args, policy=None, offload=False):
    """x = block(x, *args) for each block in turn, with activations kept as `policy` says.

    blocks: functions or modules from (x, *args) to x. policy: None, "none", "attention", "full"
    say what backward computes again: nothing; norms and activations; each layer but its attention;
    whole segments of layers (the table at the top of kernels/checkpoint.py). offload: with the last
    two, what is kept goes to host memory; on a CPU it is there already."""
    if policy not in POLICIES:
        raise ValueError(f"checkpoint: policy {policy!r}; there are None, 'none', 'attention' and "
                         "'full'")
    if offload and policy not in ("attention", "full"):
        raise ValueError(f"checkpoint: offload with policy {policy!r}; only 'attention' and 'full' "
                         "keep little enough to be moved in a layer's time")
    blocks = list(blocks)
    if policy is None or not torch.is_grad_enabled():
        for block in blocks:
            x = block(x, *args)
        return x
    for m in (m for b in blocks if isinstance(b, torch.nn.Module) for m in b.modules()):
        if isinstance(m, torch.nn.modules.dropout._DropoutNd) and m.training and m.p > 0:
            raise ValueError(f"checkpoint: {m} draws random numbers that a second run would not "
                             "meet again; set its p to 0 or take policy None")
    if policy == "none":
        for block in blocks:
            ledger = Ledger()
            with here(ledger=ledger), ledger.hooks():
                x = block(x, *args)
            for slot in ledger.close():
                slot.seal()
        return x
    if policy == "full":
        size = max(1, round(math.sqrt(len(blocks))))
        blocks = [functools.partial(checkpointed, blocks[i:i + size], policy="attention")
                  for i in range(0, len(blocks), size)]
    host, region = hosting(x.device) if offload else None, None
    for block in blocks:
        region = Region(block, policy == "attention", host=host, before=region if host else None)
        x = region(x, *args)
    return x


if __name__ == "__main__":
    import time

    import torch.nn.functional as F
    from torch import nn

    class Layer(nn.Module):
        """A transformer layer of nobody's: all that `run` asks of a layer is x -> x."""
        attention = staticmethod(keep_output(functools.partial(F.scaled_dot_product_attention,
                                                          is_causal=True)))
        norm = staticmethod(recompute(lambda x, w: F.rms_norm(x, w.shape, w, 1e-6)))
        product = staticmethod(recompute(lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1]))

        def __init__(self, C, H):
            super().__init__()
            self.H = H
            self.ones = nn.ParameterList(torch.ones(C) for _ in range(2))
            self.qkv, self.out = nn.Linear(C, 3 * C), nn.Linear(C, C)
            self.gate_up, self.down = nn.Linear(C, 6 * C), nn.Linear(3 * C, C)

        def forward(self, x):
            B, T, C = x.shape
            q, k, v = self.qkv(self.norm(x, self.ones[0])).view(B, T, 3, self.H, -1).unbind(2)
            y = self.attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
            x = x + self.out(y.transpose(1, 2).reshape(B, T, C))
            return x + self.down(self.product(self.gate_up(self.norm(x, self.ones[1]))))

    cuda = torch.cuda.is_available()
    n, C, H, T = (32, 4096, 32, 8192) if cuda else (16, 128, 4, 256)
    like = {"device": "cuda", "dtype": torch.bfloat16} if cuda else {}
    with torch.device(like.get("device", "cpu")):
        torch.manual_seed(0)
        layers = nn.ModuleList(Layer(C, H) for _ in range(n)).to(**like)
        x = torch.randn(1, T, C, **like)
    weights = {p.untyped_storage().data_ptr() for p in layers.parameters()}
    size = x.nbytes * n
    print(f"{n} layers, width {C}, {T} tokens" + ("" if cuda else "; no GPU here: a small stack"))
    first = None
    for policy in POLICIES:
        def count(t):
            if t.untyped_storage().data_ptr() not in weights:
                kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t.detach()

        for _ in range(2):                  # the first is for warming up
            layers.zero_grad()
            kept = {}
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            with saved_tensors_hooks(count, lambda t: t):
                loss = checkpointed(layers, x, policy=policy).float().square().mean()
            loss.backward()
            if cuda:
                torch.cuda.synchronize()
            took = time.perf_counter() - start
        grads = [p.grad.clone() for p in layers.parameters()]
        first = first or grads
        print(f"{policy!s:10} kept {sum(kept.values()) / size:6.2f} of its layer inputs"
              f"   {1e3 * took:8.1f} ms"
              + (f"   peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if cuda else "")
              + f"   gradients equal: {all(map(torch.equal, grads, first))}")
