"""kernels/adamw.py: AdamW in one pass over 8 bytes of state a weight instead of 16.

    m ← β₁ m + (1 - β₁) g          m̂ = m / (1 - β₁ᵗ)                    [Adam] 1412.6980
    v ← β₂ v + (1 - β₂) g²         v̂ = v / (1 - β₂ᵗ)
    w ← w - lr λ w - lr m̂ / (√v̂ + ε)                        decay apart: [AdamW] 1711.05101

Bytes a weight, kept and moved, with bf16 gradients (7B: 6.76 G weights; GB = 10⁹ bytes; computed):

                       weight   m, v     kept   read + written     7B kept
    fp32 and a copy    2 + 4    4 + 4    14     2 + 12 + 14 = 28   94.6 GB    usual mixed precision
    here               2 + 2    1 + 1     6     2 +  6 +  6 = 14   40.8 GB
    here, stochastic   2        1 + 1     4     2 +  4 +  4 = 10   27.2 GB
    and 8 bytes of scales for 256 weights: 0.03 a weight

The weight. bf16 keeps 8 bits: near 0.05 its steps are 2⁻¹², 2.4e-4, and an update of 2e-5 rounds to
nothing. Two ways out:
    low half     master bits = (weight bits · 2¹⁶) + low, as integers. The weight is the master
                 rounded to nearest (halves away from zero), low is what rounding cut off, a signed
                 int16. Together they are the fp32 master, exactly.
    stochastic   no low half: a random number below 2¹⁶ is added to the 16 bits before they are cut
                 off. An update of a tenth of a step then moves one weight in ten by a whole one:
                 right on average. No two runs with other seeds agree.          [SR] 1502.02551

m and v. Blocks of 256 with one fp32 scale each, the largest magnitude.         [8bit] 2110.02861
Codes are spread by a root, so that small ones are not lost beside large ones:
    m = scale · sign(c) (c/127)²,  c int8        v = scale · (c/255)⁴,  c uint8:  √v like m
Rounded to nearest they would stand still: v falls by a thousandth a step when gradients fade, half
a code is eight thousandths at least, so it would round back for ever. So codes are rounded
stochastically: errors cancel over the steps. Only v below code 4, where one code is a large factor,
always goes up: a small v beside a large one must not become 0, or its weight is thrown by m / ε.

What is left of a wrong pair is cut off where exact Adam cannot be. With m = Σ aᵢ gᵢ, v = Σ bᵢ gᵢ²,
aᵢ = (1 - β₁) β₁ⁱ and bᵢ = (1 - β₂) β₂ⁱ, Cauchy and Schwarz say |m| ≤ √(Σ aᵢ²/bᵢ) √v, so

    |m̂| / √v̂ ≤ C = √( (1-β₁)²/(1-β₂) · (1-ρᵗ)/(1-ρ) · (1-β₂ᵗ) ) / (1-β₁ᵗ),   ρ = β₁²/β₂

1 at t = 1, 7.3 in the end for (.9, .999). A step is held to 1.001 lr C: rounding has room, exact
Adam is never touched.

Random numbers are a hash of place, step and seed: nothing to keep, the same on every device.

The same bits? Weights and low halves that come out of equal moments are, in the kernel and in the
specification, because both round division and square root correctly. The codes of the moments need
not be: there a GPU takes its quick square root, and a code may come out one higher or lower.

offload: the states live in the host's memory and visit the device for their step (host_state.py).

Alone: `python -m kernels.adamw` prints errors against fp64 and, on a GPU, GB/s beside a copy.
Next: bench/, all of this against what people use.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from kernels.host_state import host_memory
from kernels.launch import fused, jit, tl, triton

BLOCK = 256                     # weights that share a scale
ROWS = 8                        # blocks a program: one for each of its 8 warps


class Scalars(NamedTuple):
    """What one step needs beside the tensors, worked out in double precision as torch does."""
    key: int                    # of the random numbers; odd, so that Triton compiles one kernel
    decay: float                # 1 - lr λ
    beta1: float
    rest1: float                # 1 - β₁
    beta2: float
    rest2: float
    size: float                 # lr / (1 - β₁ᵗ)
    root: float                 # √(1 - β₂ᵗ)
    eps: float
    limit: float                # of |lr m̂ / √v̂|


def mix(x):
    """A 32-bit hash: every bit of x, an int or an int64 tensor, turns about half of the result."""
    x = (x ^ x >> 16) * 0x21F0AAAD & 0xFFFFFFFF
    x = (x ^ x >> 15) * 0x735A2D97 & 0xFFFFFFFF
    return x ^ x >> 15


def scalars(step, lr, betas, eps, decay, seed=0):
    """Step 1, 2, 3 ... of AdamW."""
    (b1, b2), rho = betas, betas[0] ** 2 / betas[1]
    c1, c2 = 1 - b1 ** step, 1 - b2 ** step
    most = math.sqrt((1 - b1) ** 2 / (1 - b2) * (1 - rho ** step) / (1 - rho) * c2) / c1
    return Scalars(mix(mix(seed & 0xFFFFFFFF) + step & 0xFFFFFFFF) >> 1 | 1, 1 - lr * decay, b1,
                   1 - b1, b2, 1 - b2, lr / c1, c2 ** 0.5, eps, 1.001 * lr * most)


# ------------------------------------------------------------- the specification, in PyTorch

def words(n, key):
    """n random 32-bit numbers, int64: 16 bits to round a weight, 8 for m, 8 for v."""
    return mix(torch.arange(n) * 0x9E3779B1 + key & 0xFFFFFFFF)


def join(weight, low):
    """bf16 and int16 -> the fp32 master they are the halves of."""
    return ((weight.view(torch.int16).int() << 16) + low.int()).view(torch.float32)


def split(master):
    """fp32 -> bf16, rounded to nearest, and int16, the rest."""
    bits = master.contiguous().view(torch.int32)
    high = (bits + 0x8000) >> 16
    low, number = bits - (high << 16), master == master
    # a GPU's NaN, 0x7FFFFFFF, would round up to -0 and be gone
    high, low = high.where(number, 0x7FC0), low.where(number, 0)
    return high.to(torch.int16).view(torch.bfloat16), low.to(torch.int16)


def cut(master, word):
    """fp32 -> bf16, up with a chance of what is cut off."""
    bits = master.contiguous().view(torch.int32)
    high = (bits + (word & 0xFFFF).int()) >> 16
    return high.where(master == master, 0x7FC0).to(torch.int16).view(torch.bfloat16)


def decode_m(code, scale):
    """int8 (n), fp32 (blocks) -> fp32 (n)."""
    c = code.float()
    return c * c.abs() * (scale * (1 / 127 ** 2)).repeat_interleave(BLOCK)[:len(c)]


def decode_v(code, scale):
    c = code.float().square()
    return c * c * (scale * (1 / 255 ** 4)).repeat_interleave(BLOCK)[:len(c)]


def encode(x, root, top, word, up=0):
    """fp32 (n) -> codes of root(|x| / scale) · top, below `up` rounded up, and scales (blocks)."""
    n = len(x)
    blocks = torch.nn.functional.pad(x, (0, -n % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(1)
    inverse = 1 / scale.clamp(min=1e-37)                # one that small is nothing beside ε
    y = root(blocks.abs() * inverse[:, None]).view(-1)[:n] * top
    chance = (word.float() + 0.5) * (1 / 256)
    code = (y + chance).floor().where(y >= up, y.ceil())
    return code.clamp(max=top), scale


def square_root(x):
    """The square root, correctly rounded, as the kernel takes it for the weight.

    quirk: PyTorch's own on a CPU is one unit in the last place off for some numbers (MKL's vector
    square root; on one EPYC for .2 of uniform ones). A double's, cut to a float, is exact."""
    return x.double().sqrt().float()


def adamw_spec(weight, low, grad, m, v, m_scale, v_scale, s):
    """One step in place, all tensors flat: weight bf16 with low int16, or bf16 with low None
    (stochastic), or fp32 with low None. Every operation in fp32, rounded as the kernel rounds."""
    word = words(len(weight), s.key).to(weight.device)
    g = grad.float()
    new_m = decode_m(m, m_scale) * s.beta1 + g * s.rest1
    new_v = decode_v(v, v_scale) * s.beta2 + g * g * s.rest2
    change = new_m * -s.size / (square_root(new_v) / s.root + s.eps)
    wide = weight if weight.dtype == torch.float32 else weight.float() if low is None else join(
        weight, low)
    wide = wide * s.decay + change.clamp(-s.limit, s.limit)
    if low is not None:
        high, rest = split(wide)
        weight.copy_(high)
        low.copy_(rest)
    else:
        weight.copy_(wide if weight.dtype == torch.float32 else cut(wide, word))
    code, scale = encode(new_m, square_root, 127, word >> 16 & 255)
    m.copy_(code * new_m.sign())
    m_scale.copy_(scale)
    code, scale = encode(new_v, lambda x: square_root(square_root(x)), 255, word >> 24, up=4)
    v.copy_(code)
    v_scale.copy_(scale)


# ------------------------------------------------------------------------------- the kernel

@jit
def adamw_kernel(w_ptr, low_ptr, g_ptr, m_ptr, v_ptr, m_scale_ptr, v_scale_ptr, n, key,
                 decay, beta1, rest1, beta2, rest2, size, root, eps, limit,
                 KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A tile of ROWS blocks. Weights come as bits: int16, or fp32 for KIND "fp32"."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offs = rows[:, None].to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside, some = offs < n, rows.to(tl.int64) * BLOCK < n
    g = tl.load(g_ptr + offs, mask=inside, other=0).to(tl.float32)
    m = tl.load(m_ptr + offs, mask=inside, other=0).to(tl.float32)
    v = tl.load(v_ptr + offs, mask=inside, other=0).to(tl.float32)
    m_unit = tl.load(m_scale_ptr + rows, mask=some, other=0) * (1 / 127 / 127)
    v_unit = tl.load(v_scale_ptr + rows, mask=some, other=0) * (1 / 255 / 255 / 255 / 255)

    word = offs.to(tl.uint32) * 0x9E3779B1 + key.to(tl.uint32)
    word = (word ^ (word >> 16)) * 0x21F0AAAD
    word = (word ^ (word >> 15)) * 0x735A2D97
    word = word ^ (word >> 15)

    m = m * tl.abs(m) * m_unit[:, None] * beta1 + g * rest1
    v = (v * v) * (v * v) * v_unit[:, None] * beta2 + g * g * rest2
    # correctly rounded here, where the master depends on it; quick roots will do for the codes
    change = tl.div_rn(m * -size, tl.div_rn(tl.sqrt_rn(v), root) + eps)
    change = tl.where(change > limit, limit, tl.where(change < -limit, -limit, change))  # NaN stays

    w = tl.load(w_ptr + offs, mask=inside, other=0)
    if KIND == "split":
        low = tl.load(low_ptr + offs, mask=inside, other=0).to(tl.int32)
        w = ((w.to(tl.int32) << 16) + low).to(tl.float32, bitcast=True)
    if KIND == "stochastic":
        w = (w.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    w = w * decay + change
    if KIND == "fp32":
        tl.store(w_ptr + offs, w, mask=inside)
    else:
        bits = w.to(tl.int32, bitcast=True)
        if KIND == "split":
            high = (bits + 0x8000) >> 16
            low = tl.where(w == w, bits - (high << 16), 0)
            tl.store(low_ptr + offs, low.to(tl.int16), mask=inside)
        else:
            high = (bits + (word & 0xFFFF).to(tl.int32)) >> 16
        tl.store(w_ptr + offs, tl.where(w == w, high, 0x7FC0).to(tl.int16), mask=inside)

    scale = tl.max(tl.abs(m), axis=1)        # 1e-37: below 2⁻¹²⁶ Triton 3.6 reads an fp64
    tl.store(m_scale_ptr + rows, scale, mask=some)
    inverse = tl.div_rn(1.0, tl.maximum(scale, 1e-37))
    y = tl.sqrt(tl.abs(m) * inverse[:, None]) * 127
    chance = ((word >> 16 & 255).to(tl.float32) + 0.5) * (1 / 256)
    y = tl.minimum(tl.floor(y + chance), 127)
    tl.store(m_ptr + offs, tl.where(m < 0, -y, y).to(tl.int8), mask=inside)

    scale = tl.max(v, axis=1)
    tl.store(v_scale_ptr + rows, scale, mask=some)
    inverse = tl.div_rn(1.0, tl.maximum(scale, 1e-37))
    y = tl.sqrt(tl.sqrt(v * inverse[:, None])) * 255
    chance = ((word >> 24).to(tl.float32) + 0.5) * (1 / 256)
    y = tl.minimum(tl.where(y >= 4, tl.floor(y + chance), tl.ceil(y)), 255)
    tl.store(v_ptr + offs, y.to(tl.uint8), mask=inside)


def adamw_step(weight, low, grad, m, v, m_scale, v_scale, s):
    """adamw_spec's step, as one kernel where kernels run."""
    n, blocks = len(weight), -(-len(weight) // BLOCK)
    given = {"m": (m, torch.int8, n), "v": (v, torch.uint8, n),
             "m_scale": (m_scale, torch.float32, blocks),
             "v_scale": (v_scale, torch.float32, blocks), "low": (low, torch.int16, n)}
    for name, (x, dtype, size) in given.items():
        if x is not None and (x.dtype != dtype or x.shape != (size,) or not x.is_contiguous()):
            raise ValueError(f"adamw: {name} is {x.dtype} {tuple(x.shape)}; a contiguous {dtype} "
                             f"({size},) is needed")
    if (weight.dtype not in (torch.bfloat16, torch.float32) or not weight.is_contiguous()
            or weight.dim() != 1 or weight.dtype == torch.float32 and low is not None):
        raise ValueError(f"adamw: weight is {weight.dtype} {tuple(weight.shape)}, stride "
                         f"{weight.stride()}; flat contiguous bfloat16, or float32 without a low "
                         "half, is needed")
    if grad.shape != weight.shape or grad.dtype not in (torch.bfloat16, torch.float16,
                                                        torch.float32):
        raise ValueError(f"adamw: gradient {grad.dtype} {tuple(grad.shape)} for a weight "
                         f"{tuple(weight.shape)}; bfloat16, float16 or float32 of its shape is "
                         "needed")
    bits = weight if weight.dtype == torch.float32 else weight.view(torch.int16)
    if not n:
        return
    if not fused(bits, low, grad, m, v, m_scale, v_scale):
        return adamw_spec(weight, low, grad, m, v, m_scale, v_scale, s)
    kind = "fp32" if bits is weight else "stochastic" if low is None else "split"
    # no fused multiply-add: it would round once where the specification rounds twice
    adamw_kernel[(triton.cdiv(blocks, ROWS),)](
        bits, bits if low is None else low, grad.contiguous(), m, v, m_scale, v_scale, n, *s,
        KIND=kind, ROWS=ROWS, BLOCK=BLOCK, num_warps=8, enable_fp_fusion=False)


# ------------------------------------------------------------------------------ the optimizer

class AdamW(torch.optim.Optimizer):
    """torch.optim.AdamW for weights in bf16, or fp32, with 8-bit states.

    stochastic: no low halves. seed: of the rounding; another one a process is not needed. offload:
    states are kept in the host's memory; call host_memory(device).wait() before reading them."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2,
                 stochastic=False, seed=0, offload=False):
        if not (lr >= 0 and eps > 0 and weight_decay >= 0
                and 0 <= betas[0] ** 2 < betas[1] < 1):
            raise ValueError(f"adamw: lr {lr}, betas {betas}, eps {eps}, weight_decay "
                             f"{weight_decay}; none negative, eps above 0 and β₁² < β₂ < 1 are "
                             "needed")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps,
                                  "weight_decay": weight_decay, "stochastic": stochastic,
                                  "seed": seed})
        self.offload, self.visits = offload, {}     # weight -> its states on their way here

    def __getstate__(self):
        return {**super().__getstate__(), "offload": self.offload, "visits": {}}

    def begin(self, p, stochastic):
        """The state of a weight before its first step."""
        if p.dtype not in (torch.bfloat16, torch.float32) or not p.is_contiguous():
            raise ValueError(f"adamw: weight is {p.dtype}, stride {p.stride()}; contiguous "
                             "bfloat16 or float32 is needed")
        n, blocks = p.numel(), -(-p.numel() // BLOCK)
        zeros = {"m": (n, torch.int8), "v": (n, torch.uint8), "m_scale": (blocks, torch.float32),
                 "v_scale": (blocks, torch.float32)}
        if p.dtype == torch.bfloat16 and not stochastic:
            zeros["low"] = (n, torch.int16)
        state = {"step": torch.tensor(0)}
        for key, (size, dtype) in zeros.items():
            if self.offload:
                state[key] = host_memory(p.device).zeros(size, dtype)
            else:
                state[key] = torch.zeros(size, dtype=dtype, device=p.device)
        return state

    def fetch(self, p, stochastic):
        """Begin to copy the states of a weight from the host, where they are kept there."""
        if not self.state[p]:
            self.state[p].update(self.begin(p, stochastic))
        if self.offload and p not in self.visits:
            states = {key: x for key, x in self.state[p].items() if key != "step"}
            self.visits[p] = host_memory(p.device).fetch(states)

    def fetch_ahead(self):
        """The same for all weights with a gradient: `step` then need not wait for the copies."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.fetch(p, group["stochastic"])

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure() if closure else None
        place = 0                           # of a weight among all: so that no two round alike
        for group in self.param_groups:
            for p in group["params"]:
                place += 1
                if p.grad is None:
                    continue
                self.fetch(p, group["stochastic"])
                state = self.state[p]
                here = self.visits.pop(p).get() if self.offload else state
                state["step"] = state["step"].cpu() + 1         # a resumed run may have moved it
                s = scalars(int(state["step"]), float(group["lr"]), group["betas"], group["eps"],
                            group["weight_decay"], mix(group["seed"]) + place)
                adamw_step(p.view(-1), here.get("low"), p.grad.reshape(-1), here["m"], here["v"],
                           here["m_scale"], here["v_scale"], s)
                if self.offload:
                    host_memory(p.device).send(here, state)
        return loss

    def place(self, p, key, x):
        """Take x, a state of weight p that was saved, to where this optimizer keeps it."""
        if key == "step":               # counted on the CPU
            self.state[p][key] = x.to("cpu", copy=True)
        elif self.offload:
            self.state[p][key] = host_memory(p.device).like(x).copy_(x)
        else:
            self.state[p][key] = x.to(p.device, copy=True)

    def master(self, p):
        """The fp32 weight that p is the bf16 half of."""
        low = self.state[p].get("low")
        if low is None:
            return p.detach().float()
        return join(p.detach().view(-1), low.to(p.device)).view(p.shape)

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        # quirk: PyTorch casts a state to its weight's dtype, int8 codes to bf16 too; put them back
        numbers = [i for group in state_dict["param_groups"] for i in group["params"]]
        weights = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(numbers, weights):
            if i in state_dict["state"]:
                self.state[p] = {}
                for key, x in state_dict["state"][i].items():
                    self.place(p, key, x)


def compile_cases():
    """The shipped tiles, for compilation ahead of time."""
    pointers = {"w_ptr": "*i16", "low_ptr": "*i16", "g_ptr": "*bf16", "m_ptr": "*i8",
                "v_ptr": "*u8", "m_scale_ptr": "*fp32", "v_scale_ptr": "*fp32"}
    numbers = {"n": "i32", "key": "i32", **dict.fromkeys(Scalars._fields[1:], "fp32")}
    return [{"name": f"adamw {kind}", "kernel": adamw_kernel,
             "signature": {**pointers, **numbers, "w_ptr": "*fp32" if kind == "fp32" else "*i16"},
             "constexprs": {"KIND": kind, "ROWS": ROWS, "BLOCK": BLOCK},
             "divisible": {*pointers, "n"}, "num_warps": 8, "num_stages": 3, "dot": False}
            for kind in ("split", "stochastic", "fp32")]


if __name__ == "__main__":
    import time

    def exact(w, grad, m, v, s):
        """The same step on fp64 master and moments, unrounded."""
        m, v = m * s.beta1 + grad * s.rest1, v * s.beta2 + grad * grad * s.rest2
        return w * s.decay - s.size * m / (v.sqrt() / s.root + s.eps), m, v

    gpu = torch.cuda.is_available()
    device, n = ("cuda", 1 << 28) if gpu else ("cpu", 1 << 16)
    for kind in ("split", "stochastic"):
        torch.manual_seed(0)
        start = torch.randn(1 << 16, device=device) * 0.05
        weight, low = split(start)
        low = low if kind == "split" else None
        w = (join(weight, low) if low is not None else weight.float()).double()
        size, first = len(weight), w.clone()
        m, v = torch.zeros_like(w), torch.zeros_like(w)
        states = [torch.zeros(size, dtype=torch.int8, device=device),
                  torch.zeros(size, dtype=torch.uint8, device=device),
                  torch.zeros(size // BLOCK, device=device),
                  torch.zeros(size // BLOCK, device=device)]
        lean = torch.randn(size, device=device)
        for t in range(1, 101):
            s = scalars(t, 2e-5, (.9, .999), 1e-8, 0)
            grad = (lean + torch.randn(size, device=device)).bfloat16()
            adamw_step(weight, low, grad, *states, s)
            w, m, v = exact(w, grad.double(), m, v, s)
        ours = (join(weight, low) if low is not None else weight.float()).double() - first
        print(f"{kind:10} 100 steps of 2e-5 against fp64: cosine of the ways "
              f"{float(torch.cosine_similarity(ours, w - first, 0)):.4f}, "
              f"length {float(ours.norm() / (w - first).norm()):.4f}")
    if not gpu:
        print("no GPU here: no GB/s")
    else:
        def median(f):
            times = []
            for _ in range(12):
                torch.cuda.synchronize()
                start = time.perf_counter()
                f()
                torch.cuda.synchronize()
                times.append(time.perf_counter() - start)
            return sorted(times)[6]

        a = torch.empty(n, dtype=torch.float32, device=device)
        b = torch.empty_like(a)
        copy = 8 * n / median(lambda: b.copy_(a)) / 1e9
        print(f"copy {copy:.0f} GB/s")
        for kind, moved in (("split", 14), ("stochastic", 10)):
            p = torch.nn.Parameter(torch.randn(n, device=device).bfloat16())
            p.grad, o = torch.randn_like(p), AdamW([p], 2e-5, stochastic=kind == "stochastic")
            speed = moved * n / median(o.step) / 1e9
            print(f"{kind:10} {speed:.0f} GB/s, {100 * speed / copy:.0f} % of the copy")
