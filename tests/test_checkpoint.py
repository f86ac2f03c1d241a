"""kernels/checkpoint.py: equal gradients, attention once, and by how much less is kept."""

import functools
import gc
import sys
import weakref
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import clip
import llama
from kernels import checkpoint, offload
from kernels.checkpoint import POLICIES, checkpointed, keep_output
from tiny import shaken

DEPTH, T = 9, 48


@pytest.fixture
def launches(monkeypatch):
    """A list that grows with each attention that the models run."""
    made, file = [], sys.modules["kernels.attention"]       # kernels.attention is the function
    known = file.reference

    def counted(*args):
        made.append(1)
        return known(*args)

    monkeypatch.setattr(file, "reference", counted)
    return made


def decoder(depth=DEPTH):
    """Four heads to one key head, and a function of the policy that runs it."""
    model = shaken(llama.Llama(llama.Config(vocab=50, width=64, depth=depth, heads=4, kv_heads=1,
                                            mlp=172)))
    ids = torch.randint(0, 50, (2, T), generator=torch.Generator().manual_seed(0))

    def loss(policy, attention_mask=None, offload=False):
        model.checkpoint, model.offload = policy, offload
        return model(ids, attention_mask=attention_mask).square().mean()

    return model, loss


def towers():
    """CLIP's two: the picture tower runs all blocks but the last, the text tower all."""
    size = {"width": 64, "depth": DEPTH, "heads": 4, "mlp": 128}
    model = shaken(clip.CLIP(clip.Config(**size, image_size=28, patch_size=4),
                             clip.Config(**size, vocab=50, context=T, eos_id=49), 32))
    dice = torch.Generator().manual_seed(0)
    pixels, ids = torch.randn(2, 3, 28, 28, generator=dice), torch.randint(0, 50, (2, T),
                                                                          generator=dice)

    def loss(policy):
        model.vision.checkpoint = model.text.checkpoint = policy
        return model.vision(pixels).pow(4).mean() + model.text(ids).pow(4).mean()

    return model, loss


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def equal(a, b):
    return len(a) == len(b) > 0 and all(map(torch.equal, a, b))


def padding():
    keep = torch.ones(2, T, dtype=torch.bool)
    keep[1, 30:] = False
    return keep


@pytest.mark.parametrize("case", ["causal", "padded", "autocast", "frozen", "clip"])
def test_gradients_are_bit_equal_and_attention_runs_once(launches, case):
    model, loss = towers() if case == "clip" else decoder()
    if case == "padded":
        loss = functools.partial(loss, attention_mask=padding())
    if case == "frozen":                # as in stage 1: only what is in front of the layers trains
        for p in (*model.blocks.parameters(), *model.norm.parameters(), *model.head.parameters()):
            p.requires_grad_(False)
    first = None
    for policy in POLICIES:
        launches.clear()
        with torch.autocast("cpu", torch.bfloat16) if case == "autocast" else nullcontext():
            value = loss(policy)
        found = gradients(model, value)
        first = first or found
        assert equal(found, first), policy
        blocks = 2 * DEPTH - 1 if case == "clip" else DEPTH
        assert len(launches) == blocks * (2 if policy == "full" else 1), policy
    learning = [p for n, p in model.named_parameters() if case != "clip" or not any(
        part in n for part in (f"vision.blocks.{DEPTH - 1}", "norm_post", "projection", "scale"))]
    assert len(first) == (1 if case == "frozen" else len(learning))


def test_a_block_that_draws_random_numbers_is_caught(launches):
    """Control, on a LLaMA: told to torch it is refused, and hidden from it the gradients differ."""
    model, loss = decoder(3)
    down = model.blocks[1].down
    model.blocks[1].down = torch.nn.Sequential(down, torch.nn.Dropout(.1)).train()
    for policy in POLICIES[1:]:
        with pytest.raises(ValueError, match="random"):
            loss(policy)
    loss(None)
    model.blocks[1].down = down
    down.register_forward_hook(lambda layer, args, out: F.dropout(out, .1))
    found = []
    for policy in (None, None, *POLICIES[2:]):
        torch.manual_seed(0)
        found.append(gradients(model, loss(policy)))
    assert equal(found[0], found[1]) and not any(equal(f, found[0]) for f in found[2:])


def test_the_comparison_sees_a_second_run_that_differs(launches):
    """Control: a layer that is not the same twice has other gradients, and none that differs in
    what it saves gets away with it."""
    weight, seen = torch.ones(4, requires_grad=True), []

    def drifting(x):
        seen.append(1)
        return (x * weight * (1 + .1 * len(seen))).sin()

    x = torch.linspace(1, 2, 4)
    checkpointed([drifting], x, policy=None).sum().backward()
    true, weight.grad = weight.grad, None
    seen.clear()
    checkpointed([drifting], x, policy="attention").sum().backward()
    assert len(seen) == 2 and not torch.equal(weight.grad, true)

    def shrinking(x):
        seen.append(1)
        return x * weight if len(seen) > 1 else (x * weight).sin()

    seen.clear()
    y = checkpointed([shrinking], x, policy="attention")
    with pytest.raises(RuntimeError, match="the same both times"):
        y.sum().backward()


def kept(model, loss, policy):
    """Bytes autograd saved in forward, each memory once, without the weights."""
    weights, found = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(x):
        found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x.detach()

    with saved_tensors_hooks(pack, lambda x: x):
        value = loss(policy)
    return value, sum(size for place, size in found.items() if place not in weights)


class Live(TorchDispatchMode):
    """The largest number of bytes that were alive at once, of what was made inside."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs))
                 if torch.is_tensor(x)}
        for x in tree_leaves(out):
            memory = x.untyped_storage() if torch.is_tensor(x) else None
            if memory is not None and memory._cdata not in given | self.known.keys():
                self.now += memory.nbytes()
                self.known[memory._cdata] = weakref.finalize(
                    memory, self.free, memory._cdata, memory.nbytes())
        self.most = max(self.most, self.now)
        return out

    def free(self, place, size):
        self.now -= size
        del self.known[place]


def shares(make):
    """What each policy keeps, in units of all layer inputs; backward is run from it too."""
    (model, loss), found = make(), {}
    for policy in POLICIES:
        value, size = kept(model, loss, policy)
        gradients(model, value)
        found[policy] = size / (2 * T * 64 * 4 * DEPTH)
    return found


def frugal(found):
    """Each keeps under two thirds of the one before."""
    return all(b < .66 * a for a, b in pairwise(found.values()))


def test_how_much_less_is_kept(launches, monkeypatch):
    """9 layers, MLP 2.7 times as wide, one key head for 4."""
    found = shares(decoder)
    # none: x 1, q k v 1.5, o 1, h 1, gate and up 5.4, statistics
    assert 9.9 < found["none"] < 10.6 and 2.4 < found["attention"] < 2.6, found
    assert .33 < found["full"] < .8 and frugal(found), found
    assert frugal(shares(towers))           # where attention on a CPU keeps its probabilities
    # control: a policy that lies, and runs the blocks as ever
    monkeypatch.setattr(llama, "checkpointed", lambda *args, policy, offload: checkpointed(*args))
    lied = shares(decoder)
    assert not frugal(lied) and lied["full"] == lied[None] == found[None], lied


def test_the_peak_falls_too(launches):
    """Forward and backward together, second runs and gradients included; 16 layers."""
    model, loss = decoder(16)
    gradients(model, loss(None))                        # the gradients' own memory is there already
    most = {}
    for policy in POLICIES:
        for p in model.parameters():
            p.grad.zero_()
        with Live() as live:
            loss(policy).backward()
        most[policy] = live.most
    told = {k: round(v / (2 * T * 64 * 4), 1) for k, v in most.items()}
    assert most[None] > 1.5 * most["none"] and most["none"] > 2 * most["attention"], told
    assert most["attention"] > 1.1 * most["full"], told


def test_nothing_outlives_backward(launches):
    """No cycle keeps a region, a slot or attention's graph: all goes without the collector."""
    model, loss = decoder(3)
    kinds = (checkpoint.Region, checkpoint.Slot, checkpoint.Call)
    gc.collect()
    gc.disable()
    try:
        for policy in POLICIES[1:]:
            value = loss(policy)
            assert any(type(x) in kinds for x in gc.get_objects())
            value.backward()
            del value
            assert not any(type(x) in kinds for x in gc.get_objects()), policy
            loss(policy)                                # nor where backward never comes
            assert not any(type(x) in kinds for x in gc.get_objects()), policy
    finally:
        gc.enable()


class Taught(torch.autograd.Function):
    """Attention as a kernel has it: output and log-sum-exp from forward, q, k, v in backward."""

    @staticmethod
    def forward(ctx, q, k, v):
        scores = q @ k.transpose(1, 2)
        lse = scores.logsumexp(-1, keepdim=True)
        out = (scores - lse).exp() @ v
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse = ctx.saved_tensors
        p = (q @ k.transpose(1, 2) - lse).exp()
        ds = p * (grad @ v.transpose(1, 2) - (grad * out).sum(-1, keepdim=True))
        return ds @ k, ds.transpose(1, 2) @ q, p.transpose(1, 2) @ grad


@pytest.mark.parametrize("attention", [
    Taught.apply, lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
    lambda q, k, v: (q @ k.transpose(1, 2)).softmax(-1) @ v,
    lambda q, k, v: v + 0 * q * k, lambda q, k, v: v])
def test_any_attention_that_can_be_differentiated(attention):
    """Also one whose result is v itself, or whose inputs are parts of one tensor."""
    torch.manual_seed(0)
    weight = torch.randn(16, 48, requires_grad=True)
    x = torch.randn(2, 5, 16)
    known = keep_output(attention)

    def layer(x):
        q, k, v = (x @ weight).chunk(3, -1)
        return x + known(q, k, v).tanh()

    found = []
    for policy in POLICIES:
        weight.grad = None
        checkpointed([layer] * 4, x, policy=policy).square().sum().backward()
        found.append([weight.grad])
    assert all(equal(f, found[0]) for f in found)


def test_offload_moves_out_what_is_kept_and_fetches_one_ahead(launches, monkeypatch):
    """The order of things, with a stand-in for the GPU's copies."""
    told = []

    class Away:
        def __init__(self, x):
            self.x, self.number = x.clone(), sum(kind == "put" for kind, _ in told)
            told.append(("put", self.number))

        def fetch(self):
            told.append(("fetch", self.number))

        def get(self):
            told.append(("get", self.number))
            return self.x

    model, loss = decoder()
    plain = gradients(model, loss(None))
    assert equal(gradients(model, loss("full", offload=True)), plain) and not told  # lies there
    monkeypatch.setattr(checkpoint, "hosting", lambda device: Away)
    value, size = kept(model, functools.partial(loss, offload=True), "full")
    assert [kind for kind, _ in told] == ["put"] * 3                # one input a segment
    assert equal(gradients(model, value), plain)
    order = [entry for entry in told if entry[0] != "put"]
    assert order == [("get", 2), ("fetch", 1), ("get", 1), ("fetch", 0), ("get", 0)]
    told.clear()
    assert equal(gradients(model, loss("attention", offload=True)), plain)
    assert len({n for kind, n in told if kind == "put"}) == 3 * DEPTH       # x, o, log-sum-exp
    _, stays = kept(model, loss, "full")
    assert size < stays - 2 * 2 * T * 64 * 4                        # its hooks no longer see them


class Stream:
    """Records who waits for what; an event is (its stream, the copies before it)."""
    said, copies = [], 0

    def wait_stream(self, other):
        self.said.append("all of the other stream")

    def wait_event(self, event):
        self.said.append(event)

    def record_event(self):
        Stream.copies += 1
        return Stream.copies


def test_a_fetched_tensor_waits_for_its_own_copy_alone(monkeypatch):
    side, now, arena = Stream(), Stream(), offload.Arena(4096, pinned=False)
    monkeypatch.setattr(offload, "side_of", lambda device: (side, arena))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, stream: None, raising=False)
    x, y = torch.randn(5, 7), torch.randn(3, 2).T
    away = [offload.Hosted(x), offload.Hosted(y)]
    assert Stream.said == ["all of the other stream"] * 2       # what it sends has to be there
    Stream.said.clear()
    away[1].fetch()
    away[0].fetch()                                             # on its way behind the first
    away[1].fetch()                                             # asked for again: once is enough
    assert torch.equal(away[1].get(), y) and Stream.said == [1]
    assert torch.equal(away[0].get(), x) and Stream.said == [1, 2]
    assert arena.lent == 2
    del away
    gc.collect()
    assert arena.lent == 0


def test_host_memory_is_cut_from_blocks_and_begins_again_when_all_is_back():
    arena = offload.Arena(4096, pinned=False)
    shapes = [(300,), (5, 7), (300,), (500,)]                   # 1,200 + 140 + 1,200 + 2,000 bytes
    taken = [arena.take(torch.empty(shape)) for shape in shapes]
    for number, x in enumerate(taken):
        x.fill_(number)
        assert x.shape == shapes[number] and x.data_ptr() % 64 == 0
    assert all((x == number).all() for number, x in enumerate(taken))       # none lies on another
    assert [len(block) for block in arena.blocks] == [4096, 4096]
    for _ in taken[1:]:
        arena.release()
    assert arena.take(torch.empty(1)).data_ptr() != taken[0].data_ptr()     # one is still out
    arena.release()
    arena.release()
    again = arena.take(torch.empty(5000))                       # larger than a block: of its own
    assert len(arena.blocks) == 3 and len(arena.blocks[2]) == 32768
    arena.release()
    assert arena.take(torch.empty(3)).data_ptr() == taken[0].data_ptr() != again.data_ptr()


def test_host_memory_keeps_the_order_in_memory():
    """A view of what is kept is cut from it by its strides."""
    arena = offload.Arena(4096, pinned=False)
    x = torch.randn(2, 3, 4).permute(2, 0, 1)
    host = arena.take(x).copy_(x)
    assert host.stride() == x.stride() and torch.equal(host, x)
    gaps = torch.randn(4, 8)[:, ::2]
    assert torch.equal(arena.take(gaps).copy_(gaps), gaps)
    assert arena.take(torch.empty(0, 3)).shape == (0, 3)
    assert arena.take(torch.ones(2, dtype=torch.bool)).dtype == torch.bool


def test_without_gradients_nothing_is_kept(launches):
    model, loss = decoder(2)
    with torch.no_grad():
        values = [loss(policy) for policy in POLICIES]
    assert all(torch.equal(v, values[0]) for v in values) and values[0].grad_fn is None


def test_bad_input_is_refused():
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="policy 'half'"):
        checkpointed([torch.sin], x, policy="half")
    for policy in (None, "none"):
        with pytest.raises(ValueError, match="offload"):
            checkpointed([torch.sin], x, policy=policy, offload=True)
    block = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(.1))
    with pytest.raises(ValueError, match="random"):
        checkpointed([block], x, policy="full")
    checkpointed(
        [block.eval()], x, policy="full"
    ).sum().backward()  # control: silent, it is no harm
    assert x.grad is not None
