"""norm, rope, swiglu and cross_entropy in Triton's interpreter, against their specifications.

The rule: with the same inputs, a kernel's error to the fp64 specification is at most twice the
error that the specification itself makes in the kernel's dtype. It holds for outputs and gradients,
each by its largest entry and by its root mean square."""

import ast
import importlib
import inspect
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

# kernels/__init__ gives some functions the names of their files
norm, rope, swiglu, cross_entropy = (importlib.import_module(f"kernels.{name}") for name in (
    "norm", "rope", "swiglu", "cross_entropy"))
ROOT = Path(__file__).parents[2]
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])


def randn(*shape, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=g).to(dtype)


def results(f, inputs, dtype):
    """Outputs of f and gradients to its inputs, in dtype, for fixed gradients coming in.

    Each input is one tensor, or (base, view): f gets view(base), as strided as it comes."""
    pairs = [i if type(i) is tuple else (i, lambda t: t) for i in inputs]
    leaves = [base.detach().to(dtype).requires_grad_() for base, _ in pairs]
    outputs = f(*(view(leaf) for leaf, (_, view) in zip(leaves, pairs)))
    outputs = outputs if type(outputs) is tuple else (outputs,)
    coming = [randn(*o.shape, seed=7 + i).half().to(o.dtype) for i, o in enumerate(outputs)]
    found = [*outputs, *torch.autograd.grad(outputs, leaves, coming)]
    return [t.detach() for t in found]


def ratio(ours, spec, *draws, dtype=torch.float32):
    """Our error over the specification's, the worst of all outputs, gradients and both measures.

    draws: one or more lists of inputs; what they give is judged together."""
    found = []
    for inputs in draws:
        inputs = [(i[0].to(dtype), i[1]) if type(i) is tuple else i.to(dtype) for i in inputs]
        found.append((results(spec, inputs, torch.float64), results(spec, inputs, dtype),
                      results(ours, inputs, dtype)))
    truths, theirs, ours = ([torch.stack(of_all_draws) for of_all_draws in zip(*each, strict=True)]
                            for each in zip(*found))
    worst = 0.
    for true, theirs, mine in zip(truths, theirs, ours, strict=True):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
        for size in (lambda t: t.abs().max(), lambda t: t.square().mean().sqrt()):
            if true.numel():
                # half a unit in the last place is nobody's fault; a lucky number may have less
                unit = torch.finfo(dtype).eps / 2 * size(true)
                worst = max(worst, (size(mine - true) / size(theirs - true).maximum(unit)).item())
    return worst


# ---- norm ----

RMS = partial(norm.rms_norm, eps=1e-5), partial(norm.rms_norm_spec, eps=1e-5)
ADD = (lambda x, r, w: norm.rms_norm(x, w, 1e-5, r),
       lambda x, r, w: norm.rms_norm_spec(x, w, 1e-5, r))
LAYER = partial(norm.layer_norm, eps=1e-5), partial(norm.layer_norm_spec, eps=1e-5)


@BOTH
@pytest.mark.parametrize("rows,C", [(1, 64), (7, 37), (4, 65), (5, 88), (2, 577), (0, 16)])
def test_norms(rows, C, dtype):
    draws = [(randn(rows, C, seed=s) + .3, 1 + randn(C, seed=s) / 4, randn(C, seed=s + 9),
              randn(rows, C, seed=s + 99)) for s in range(4 if rows == 1 else 1)]
    assert ratio(*RMS, *((x, w) for x, w, _, _ in draws), dtype=dtype) <= 2
    assert ratio(*ADD, *((x, r, w) for x, w, _, r in draws), dtype=dtype) <= 2
    assert ratio(*LAYER, *((x, w, b) for x, w, b, _ in draws), dtype=dtype) <= 2


@BOTH
def test_norms_of_views_that_are_not_contiguous(dtype):
    wide = randn(3, 5, 80)
    views = [lambda t: t[..., 7:44], lambda t: t[:, ::2, 1:75:2],
             lambda t: t.transpose(0, 1)[..., :37], lambda t: t[:1, :, :37].expand(3, 5, 37)]
    for view in views:
        assert ratio(*RMS, ((wide, view), randn(37)), dtype=dtype) <= 2
        assert ratio(*LAYER, ((wide, view), randn(37), randn(37, seed=1)), dtype=dtype) <= 2
        assert ratio(*ADD, ((wide, view), (wide + 1, view), randn(37)), dtype=dtype) <= 2


def test_norm_rule_catches_a_wrong_norm():
    x, w, zero = randn(6, 64) + .3, 1 + randn(64) / 4, torch.zeros(64)
    assert ratio(partial(norm.rms_norm, eps=1.2e-5), RMS[1], (x, w)) > 2
    assert ratio(lambda x, w: norm.layer_norm(x, w, zero, 1e-5), RMS[1], (x, w)) > 2
    swapped = lambda x, r, w: norm.rms_norm(x, w, 1e-5, r)[::-1]
    assert ratio(swapped, ADD[1], (x, x * 2, w)) > 2


def test_llama_rounds_before_the_weight():
    """y of 1/3-ish numbers in fp16 times a weight that shows the rounding."""
    x, w = randn(4, 64).half(), (1 + randn(64) / 4).half()
    assert torch.equal(norm.rms_norm(x, w, 1e-5), norm.rms_norm_spec(x, w, 1e-5))
    wide = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)
    assert not torch.equal(norm.rms_norm(x, w, 1e-5), (wide * w).half())       # rounded once


def test_either_result_of_add_and_norm_may_go_unused():
    x, r, w = (randn(5, 16, seed=s).requires_grad_() for s in range(3))
    w = w[0]
    for pick in (0, 1):
        ours, spec = (torch.autograd.grad(f(x, r, w)[pick].square().sum(), (x, r)) for f in ADD)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, spec))


class Spy:
    """A kernel that notes what it was launched with."""

    def __init__(self, kernel):
        self.kernel, self.calls = kernel, []

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.calls.append((grid, args))
            return self.kernel[grid](*args, **options)
        return launch


def test_frozen_norm_weights_cost_no_table(monkeypatch):
    spy = Spy(norm.norm_backward)
    monkeypatch.setattr(norm, "norm_backward", spy)
    x, w = randn(9, 32).requires_grad_(), randn(32)
    frozen, = torch.autograd.grad(norm.rms_norm(x, w, 1e-5).sum(), x)
    thawed, _ = torch.autograd.grad(norm.rms_norm(x, w.requires_grad_(), 1e-5).sum(), (x, w))
    tables = [args[5] for _, args in spy.calls]
    assert tables[0] is None and tables[1].shape == (3, 32) and torch.equal(frozen, thawed)


def test_a_norm_keeps_only_what_it_was_given():
    x, w, kept = randn(9, 32).requires_grad_(), randn(32).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        norm.rms_norm(x, w, 1e-5)
        ours = {t.data_ptr() for t in kept}
        kept.clear()
        norm.rms_norm_spec(x, w, 1e-5)
    assert ours == {x.data_ptr(), w.data_ptr()}
    assert {t.data_ptr() for t in kept} > ours                 # control: the spec keeps more


# ---- rope ----

def table(B, T, D):
    at = torch.arange(T)[None] + 5 * torch.arange(B)[:, None]
    return rope.rope_table(at, D, 1e4)


def turned(f, B, T, D, **more):
    """f with its tables filled in; in fp64 for an fp64 x."""
    cos, sin = table(B, T, D)
    wide = lambda x, t: t.double() if x.dtype == torch.float64 else t
    return lambda x: f(x, wide(x, cos), wide(x, sin), **more)


@BOTH
@pytest.mark.parametrize("B,T,H,D,tables", [(1, 1, 4, 64, 1), (2, 37, 3, 8, 2), (1, 65, 1, 88, 1),
                                            (3, 5, 33, 128, 1), (2, 0, 4, 16, 2), (2, 9, 2, 2, 1)])
def test_rope(B, T, H, D, tables, dtype):
    ours, spec = turned(rope.rope, tables, T, D), turned(rope.rope_spec, tables, T, D)
    assert ratio(ours, spec, [randn(B, T, H, D)], dtype=dtype) <= 2


@BOTH
def test_rope_of_q_and_k_as_they_lie_in_one_projection(dtype):
    ours, spec = turned(rope.rope, 1, 7, 16), turned(rope.rope_spec, 1, 7, 16)
    qkv = randn(2, 7, 12, 16)
    for view in (lambda t: t[:, :, :8], lambda t: t[:, :, 8:10],
                 lambda t: t.transpose(1, 2).reshape(2, 12, 7, 16).transpose(1, 2),
                 lambda t: t.transpose(2, 3).reshape(2, 7, 16, 12).transpose(2, 3)):
        assert ratio(ours, spec, [(qkv, view)], dtype=dtype) <= 2


def test_rope_rule_catches_a_wrong_rotation():
    spec, x = turned(rope.rope_spec, 1, 9, 16), [randn(2, 9, 4, 16)]

    class Forward(torch.autograd.Function):         # right, but its backward turns the same way
        @staticmethod
        def forward(ctx, x):
            return turned(rope.rope, 1, 9, 16)(x)

        @staticmethod
        def backward(ctx, dy):
            return turned(rope.rope, 1, 9, 16)(dy)

    pairs = lambda x: x.unflatten(-1, (8, 2)).transpose(-1, -2).flatten(-2)
    assert ratio(Forward.apply, spec, x) > 2
    assert ratio(lambda t: turned(rope.rope, 1, 9, 16)(pairs(t)), spec, x) > 2
    assert ratio(lambda t: rope.rope(t, *table(2, 9, 16)), spec, x) > 2


def test_rope_in_place_is_the_same_rotation_of_the_same_memory():
    cos, sin = table(1, 7, 16)
    w = randn(24, 12 * 16).requires_grad_()
    found = []
    for inplace in (False, True):
        qkv = (randn(2, 7, 24) @ w).view(2, 7, 12, 16)
        if inplace:
            qk, v = qkv[:, :, :10], qkv[:, :, 10:]
            y = rope.rope(qk, cos, sin, inplace=True)
            assert y.data_ptr() == qkv.data_ptr()
            y = qkv                                             # holds all three: q, k turned, v
        else:
            y = torch.cat((rope.rope(qkv[:, :, :10], cos, sin), qkv[:, :, 10:]), 2)
        found.append((y, *torch.autograd.grad((y * randn(2, 7, 12, 16)).sum(), w)))
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_rope_in_place_where_someone_needs_the_old_values_is_an_error():
    cos, sin = table(1, 7, 16)
    x = randn(2, 7, 4, 16).requires_grad_()
    y = x * 1
    square = y.square()                                         # its backward reads y
    rope.rope(y, cos, sin, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward()
    y = x * 1                                                   # control: nobody needs this one
    (rope.rope(y, cos, sin, inplace=True).sum() + (x * 2).sum()).backward()


# ---- swiglu, QuickGELU, GELU ----

@BOTH
@pytest.mark.parametrize("name", ["swiglu", "quick_gelu", "gelu"])
@pytest.mark.parametrize("rows,width", [(1, 1), (3, 37), (2, 65), (2, 577), (2, 2049), (0, 8)])
def test_activations(name, rows, width, dtype):
    ours, spec = getattr(swiglu, name), getattr(swiglu, f"{name}_spec")
    x = 3 * randn(rows, width * (2 if name == "swiglu" else 1))
    assert ratio(ours, spec, [x], dtype=dtype) <= 2
    if rows == 3:
        wide = 3 * randn(2, rows, 2 * width + 7)
        for view in (lambda t: t[..., 3:2 * width + 3], lambda t: t[..., 1:2 * width:2][..., :36],
                     lambda t: t.transpose(0, 1)[..., :2 * width]):
            assert ratio(ours, spec, [(wide, view)], dtype=dtype) <= 2


def test_activation_rule_catches_a_wrong_curve():
    x = [3 * randn(4, 64)]
    pairs = [(swiglu.gelu, swiglu.quick_gelu_spec), (swiglu.quick_gelu, swiglu.gelu_spec),
             (swiglu.gelu, partial(F.gelu, approximate="tanh")),
             (lambda x: swiglu.swiglu(x.roll(32, -1)), swiglu.swiglu_spec)]
    for ours, spec in pairs:
        assert ratio(ours, spec, x) > 2


@pytest.mark.filterwarnings("ignore:overflow")      # 1 / (1 + exp(200)): infinity, and then 0
def test_activations_of_large_numbers_stay_finite():
    x = torch.tensor([[-6e4, -200., -90., 90., 200., 6e4] * 2]).requires_grad_()
    for name in ("swiglu", "quick_gelu", "gelu"):
        y = getattr(swiglu, name)(x)
        dx, = torch.autograd.grad(y.sum(), x)
        assert y.isfinite().all() and dx.isfinite().all(), name


# ---- cross entropy ----

def supervised(n, V, kind, seed=3):
    """Labels (n,) of which a third is IGNORE, and per-token weights or None."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(V, (n,), generator=g)
    labels[1::3] = cross_entropy.IGNORE
    weights = torch.rand(n, generator=g)
    weights[2::5] = 0
    return labels, weights if kind == "weights" else None


@BOTH
@pytest.mark.parametrize("kind", ["mean", "weights"])
@pytest.mark.parametrize("n,V,smoothing", [(1, 37, 0.), (37, 65, .1), (65, 577, 0.),
                                           (3, 4099, .1)])
def test_cross_entropy(n, V, smoothing, kind, dtype, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK", 16)
    labels, weights = supervised(n, V, kind)
    ours, spec = (lambda x, head, f=f: f(x, head, labels, weights, smoothing) for f in (
        cross_entropy.linear_cross_entropy, cross_entropy.linear_cross_entropy_spec))
    # a few rows are a lottery of 24 numbers each: eight draws of them
    draws = [[randn(n, 24, seed=s), randn(V, 24, seed=s) / 3] for s in range(8 if n < 8 else 1)]
    assert ratio(ours, spec, *draws, dtype=dtype) <= 2
    odd = [(randn(n, 60), lambda t: t[:, 1:49:2]), (randn(24, V) / 3, lambda t: t.t())]
    if n > 1:
        assert ratio(ours, spec, odd, dtype=dtype) <= 2


def test_cross_entropy_rule_catches_a_wrong_loss():
    labels, weights = supervised(20, 65, "weights")
    spec = partial(cross_entropy.linear_cross_entropy_spec, labels=labels)
    ours = partial(cross_entropy.linear_cross_entropy, labels=labels)
    inputs = [randn(20, 24), randn(65, 24) / 3]
    for wrong in (partial(ours, smoothing=.001), partial(ours, weights=weights),
                  partial(ours, labels=labels.clamp(min=0)), lambda x, h: ours(x, h) * 1.00001):
        assert ratio(wrong, spec, inputs) > 2


def test_label_smoothing_by_hand():
    """Both paths against the sum over words, log-softmax times a target of 1 - ε and ε / V."""
    x, head = randn(4, 8), randn(5, 8)
    labels = torch.tensor([0, 4, 2, 2])
    target = torch.full((4, 5), .2 / 5)
    target[range(4), labels] += .8
    by_hand = -((x @ head.t()).log_softmax(-1) * target).sum(-1)
    w = torch.tensor([1., 0, 2, .5])
    for f in (cross_entropy.linear_cross_entropy, cross_entropy.linear_cross_entropy_spec):
        assert torch.allclose(f(x, head, labels, smoothing=.2), by_hand.mean())
        assert torch.allclose(f(x, head, labels, w, .2), (by_hand * w).sum())
        assert not torch.allclose(f(x, head, labels, w), (by_hand * w).sum())


def test_autocast_is_as_it_is_for_a_linear_layer():
    labels, weights = supervised(12, 40, "weights")
    x, head = randn(12, 8).requires_grad_(), randn(40, 8).requires_grad_()
    found = []
    for f in (cross_entropy.linear_cross_entropy, cross_entropy.linear_cross_entropy_spec):
        with torch.autocast("cpu", torch.float16):
            loss = f(x, head, labels, weights)
        found.append((loss, *torch.autograd.grad(loss, (x, head))))
    for ours, spec in zip(*found):
        assert ours.dtype == spec.dtype == torch.float32
        assert torch.allclose(ours, spec, rtol=1e-2, atol=1e-3)
    assert not torch.equal(found[0][1], torch.autograd.grad(
        cross_entropy.linear_cross_entropy(x, head, labels, weights), x)[0])    # it did round
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="bfloat16"):
        cross_entropy.linear_cross_entropy(x, head, labels, weights)


def test_nothing_supervised_is_what_the_specification_says():
    head = randn(5, 8).requires_grad_()
    for n, labels in ((0, []), (2, [cross_entropy.IGNORE] * 2)):
        x, labels = randn(n, 8).requires_grad_(), torch.tensor(labels, dtype=torch.int64)
        for weights in (None, torch.ones(n)):
            ours, spec = (f(x, head, labels, weights) for f in (
                cross_entropy.linear_cross_entropy, cross_entropy.linear_cross_entropy_spec))
            assert torch.equal(ours.isnan(), spec.isnan()) and ours.nan_to_num() == 0
            dx, dhead = torch.autograd.grad(ours, (x, head))
            assert dx.shape == x.shape and not dx.any() and not dhead.any()


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that any operation made, and how many operations were mm."""
    numbers = products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if type(out) in (tuple, list) else (out,):
            if isinstance(t, torch.Tensor) and t.is_floating_point():
                self.numbers = max(self.numbers, t.numel())
        self.products += func._schema.name == "aten::mm"
        return out


def test_logits_of_all_rows_never_exist(monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK", 16)
    n, V, C = 90, 96, 4
    labels, _ = supervised(n, V, "mean")                        # 60 rows: 4 chunks of 15
    x, head = randn(n, C).requires_grad_(), randn(V, C).requires_grad_()
    found = {}
    for f in (cross_entropy.linear_cross_entropy, cross_entropy.linear_cross_entropy_spec):
        with Largest() as made:
            torch.autograd.grad(f(x, head, labels), (x, head))
        found[f] = made
    ours, spec = found.values()
    assert ours.numbers == 15 * V and ours.products == 3 * 4
    assert spec.numbers == n * V                                # control


def test_a_frozen_head_or_frozen_features_cost_no_product():
    labels, _ = supervised(12, 40, "mean")
    yes, no = True, False
    for x_grad, head_grad, grad, products in ((yes, yes, yes, 3), (yes, no, yes, 2),
                                              (no, yes, yes, 2), (no, no, yes, 1),
                                              (yes, yes, no, 1)):
        x, head = randn(12, 8).requires_grad_(x_grad), randn(40, 8).requires_grad_(head_grad)
        with torch.set_grad_enabled(grad), Largest() as made:
            loss = cross_entropy.linear_cross_entropy(x, head, labels)
        assert made.products == products and loss.requires_grad == (grad and (x_grad or head_grad))
        if loss.requires_grad:
            loss.backward()
        assert (x.grad is not None, head.grad is not None) == (grad and x_grad, grad and head_grad)


def test_the_backward_scales_once_and_only_once():
    labels, _ = supervised(12, 40, "mean")
    x, head = randn(12, 8).requires_grad_(), randn(40, 8).requires_grad_()
    one, = torch.autograd.grad(cross_entropy.linear_cross_entropy(x, head, labels), x)
    four, = torch.autograd.grad(4 * cross_entropy.linear_cross_entropy(x, head, labels), x)
    assert torch.equal(4 * one, four) and one.any()
    loss = cross_entropy.linear_cross_entropy(x, head, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()
    assert torch.equal(x.grad, one)


# ---- all four ----

def bad_calls():
    x, w, q = randn(2, 8), randn(8), randn(1, 3, 2, 8)
    cos, sin = table(1, 3, 8)
    head, labels = randn(5, 8), torch.tensor([0, 4])
    ce, double = cross_entropy.linear_cross_entropy, torch.float64
    return {
        "channels": (lambda: norm.rms_norm(randn(2, 0), randn(0), 1e-5), "0 channels"),
        "too wide": (lambda: norm.rms_norm(x[:, :1].expand(2, 20000), w, 1e-5), "20000 channels"),
        "weight": (lambda: norm.rms_norm(x, w[:4], 1e-5), r"weight \(4,\).*must be \(8,\)"),
        "bias": (lambda: norm.layer_norm(x, w, w[:1], 1e-5), r"bias \(1,\)"),
        "residual": (lambda: norm.rms_norm(x, w, 1e-5, x[:1]), r"residual \(1, 8\)"),
        "norm dtype": (lambda: norm.rms_norm(x.to(double), w, 1e-5), "float64; float32, float16"),
        "norm stride": (lambda: norm.rms_norm(x, randn(16)[::2], 1e-5), r"strides \(2,\)"),
        "norm device": (lambda: norm.rms_norm(x, w.to("meta"), 1e-5), "cpu, meta"),
        "rope device": (lambda: rope.rope(q, cos.to("meta"), sin.to("meta")), "cpu, meta"),
        "head device": (lambda: ce(x, head.to("meta"), labels), "cpu, meta"),
        "rope odd": (lambda: rope.rope(q[..., :7], cos, sin), "D even"),
        "rope wide": (lambda: rope.rope(randn(1, 3, 2, 258), cos, sin), "2 to 256"),
        "rope table": (lambda: rope.rope(q, cos[:, :2], sin[:, :2]), r"\(1, 2, 4\).*\(1, 3, 4\)"),
        "rope tables": (lambda: rope.rope(q, cos, sin[..., :2]), r"sin \(1, 3, 2\)"),
        "rope dtype": (lambda: rope.rope(q.to(double), cos, sin), "x in torch.float64"),
        "rope table dtype": (lambda: rope.rope(q, cos.half(), sin), "cos in torch.float16"),
        "rope stride": (lambda: rope.rope(randn(1, 3, 2, 16)[..., ::2], cos, sin, True), "place"),
        "rope overlap": (lambda: rope.rope(q[:, :, :1].expand(q.shape), cos, sin, True), "none 0"),
        "swiglu odd": (lambda: swiglu.swiglu(x[:, :7]), "multiple of 2"),
        "swiglu dtype": (lambda: swiglu.swiglu(x.to(double)), "float64"),
        "gelu": (lambda: swiglu.gelu(torch.tensor(1.)), r"x \(\)"),
        "quick_gelu": (lambda: swiglu.quick_gelu(x.long()), "int64"),
        "head": (lambda: ce(x, head[:, :4], labels), r"head \(5, 4\)"),
        "head dtype": (lambda: ce(x, head.half(), labels), "head in torch.float16"),
        "labels": (lambda: ce(x, head, labels[:1]), r"labels \(1,\)"),
        "labels dtype": (lambda: ce(x, head, labels.int()), "int32"),
        "label high": (lambda: ce(x, head, labels + 1), "from 1 to 5; 0 to 4 and -100"),
        "label low": (lambda: ce(x, head, labels - 1), "from -1 to 3"),
        "weights": (lambda: ce(x, head, labels, w), r"weights \(8,\)"),
        "weights grad": (lambda: ce(x, head, labels, randn(2).requires_grad_()), "detach"),
        "smoothing": (lambda: ce(x, head, labels, smoothing=1.5), "smoothing 1.5"),
        "bf16 norm": (lambda: norm.rms_norm(x.bfloat16(), w, 1e-5), "bfloat16"),
        "bf16 rope": (lambda: rope.rope(q.bfloat16(), cos, sin), "bfloat16"),
        "bf16 swiglu": (lambda: swiglu.swiglu(x.bfloat16()), "bfloat16"),
        "bf16 head": (lambda: ce(x.bfloat16(), head.bfloat16(), labels), "bfloat16"),
    }


@pytest.mark.parametrize("name", bad_calls())
def test_bad_input_is_refused_in_one_line(name, grounded):
    call, told = bad_calls()[name]
    with pytest.raises(ValueError, match=told) as e:
        call()
    assert "\n" not in str(e.value)


def test_good_input_would_have_been_launched(grounded):
    """Control."""
    x, w, labels = randn(2, 8), randn(8), torch.tensor([0, 4])
    for call in (lambda: norm.rms_norm(x, w, 1e-5), lambda: swiglu.swiglu(x),
                 lambda: rope.rope(randn(1, 3, 2, 8), *table(1, 3, 8)),
                 lambda: cross_entropy.linear_cross_entropy(x, randn(5, 8), labels)):
        with pytest.raises(AssertionError, match="launched"):
            call()


def atomics(source):
    return [n.attr for n in ast.walk(ast.parse(source))
            if isinstance(n, ast.Attribute) and n.attr.startswith("atomic")]


def test_no_kernel_uses_atomics():
    """Their order differs from run to run, and so would the last bits of a sum."""
    for module in (norm, rope, swiglu, cross_entropy):
        assert not atomics(inspect.getsource(module))
    assert atomics("tl.atomic_add(p, x)")                       # control


def test_without_triton_the_specification_runs():
    code = ("import sys, torch, importlib\n"
            "sys.modules['triton'] = None\n"
            "norm, rope, swiglu, ce = (importlib.import_module('kernels.' + n) for n in\n"
            "                          ('norm', 'rope', 'swiglu', 'cross_entropy'))\n"
            "x = torch.ones(2, 4).bfloat16()\n"
            "print(norm.rms_norm(x, x[0], 1e-5).dtype, swiglu.gelu(x.double()).dtype)\n")
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert told.stdout.split() == ["torch.bfloat16", "torch.float64"], told.stderr


def test_the_environment_can_force_the_specification(monkeypatch):
    spy = Spy(norm.norm_forward)
    monkeypatch.setattr(norm, "norm_forward", spy)
    norm.rms_norm(randn(2, 4), randn(4), 1e-5)
    assert len(spy.calls) == 1                                  # control
    monkeypatch.setattr(importlib.import_module("kernels.launch"), "SPEC", True)
    norm.rms_norm(randn(2, 4), randn(4), 1e-5)
    assert len(spy.calls) == 1
