"""exercises.of_llama: exercises 6, 7 and 12, inside the decoder's attention.

For each: the project's own function in the exercise's signature, small inputs, classic mistakes.
"""
import math

import torch

import llama
from exercises.checking import Exercise
from kernels import attention, causal, full, rope_table
from kernels import rope as rotate


# ------------------------------------------------------------------------------ 6: RoPE

def rope(x, position_ids, base):
    cos, sin = rope_table(position_ids, x.shape[-1], base)
    return rotate(x, cos, sin)


def rope_cases():
    rng = torch.Generator().manual_seed(6)
    places = torch.tensor([[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]])       # the second: padded in front
    return [(torch.randn(1, 6, 3, 8, generator=rng), torch.arange(6)[None], 10000.0),
            (torch.randn(2, 5, 4, 12, generator=rng), places, 10000.0),
            (torch.randn(1, 4, 2, 16, generator=rng), torch.arange(7, 11)[None], 500000.0)]


def turned(x, angle):
    """The halves of x (B, T, H, D) turned by angle (B, T, D / 2)."""
    a, b = x.chunk(2, -1)
    cos, sin = angle.cos()[:, :, None], angle.sin()[:, :, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def angles(position_ids, D, base, power=2):
    m = torch.arange(D // 2)
    return position_ids[..., None] * base ** (-power * m / D)


def neighbours(x, position_ids, base):
    cos, sin = rope_table(position_ids, x.shape[-1], base)
    a, b, cos, sin = x[..., ::2], x[..., 1::2], cos[:, :, None], sin[:, :, None]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)


def minus_twice(x, position_ids, base):
    cos, sin = rope_table(position_ids, x.shape[-1], base)
    (a, b), cos, sin = x.chunk(2, -1), cos[:, :, None], sin[:, :, None]
    return torch.cat((a * cos - b * sin, b * cos - a * sin), -1)


def no_minus(x, position_ids, base):
    cos, sin = rope_table(position_ids, x.shape[-1], base)
    (a, b), cos, sin = x.chunk(2, -1), cos[:, :, None], sin[:, :, None]
    return torch.cat((a * cos + b * sin, b * cos + a * sin), -1)


def mixed_conventions(x, position_ids, base):
    """The channels are paired as halves, and the angles lie as for neighbours: 0, 0, 1, 1 ..."""
    cos, sin = (t.repeat_interleave(2, -1)[:, :, None]
                for t in rope_table(position_ids, x.shape[-1], base))
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def heads_as_positions(x, position_ids, base):
    places = torch.arange(x.shape[2])[None]
    return rope(x.transpose(1, 2).contiguous(), places, base).transpose(1, 2)


ROPE = Exercise(
    6, "ex06_rope.py", ("rope",), "rope_spec in kernels/rope.py", rope, rope_cases,
    (("the pairs are neighbours, (0, 1), (2, 3) ...: these weights want the two halves of a head",
      neighbours),
     ("it turns the other way round: the signs of the sines are exchanged",
      lambda x, position_ids, base: rope(x, -position_ids, base)),
     ("off by one: positions count from 0, these from 1",
      lambda x, position_ids, base: rope(x, position_ids + 1, base)),
     ("the exponent is -m / D: pair m turns by base ** (-2 m / D)",
      lambda x, position_ids, base: turned(x, angles(position_ids, x.shape[-1], base, 1))),
     ("the frequencies are upside down: the first pair turns fastest, by 1 a position",
      lambda x, position_ids, base: turned(x, angles(position_ids, x.shape[-1], base).flip(-1))),
     ("`position_ids` is not used: 0, 1, 2 ... is wrong where a row is padded or goes on",
      lambda x, position_ids, base: rope(x, torch.arange(x.shape[1])[None], base)),
     ("`base` is not used: Llama-3 has 500,000, not 10,000",
      lambda x, position_ids, base: rope(x, position_ids, 10000.0)),
     ("the second half has the wrong sign: y[m + D / 2] adds x[m] * sin", minus_twice),
     ("the minus is missing: y[m] subtracts x[m + D / 2] * sin", no_minus),
     ("the channels are paired as halves and the angles repeated as for neighbours: pair m has one "
      "angle, at m and at m + D / 2", mixed_conventions),
     ("the angles run over the heads: a position is an index of dimension 1", heads_as_positions)),
    ("y",))


# ------------------------------------------------------------------------------ 7: a cache step

def cache_step(q, k, v, k_cache, v_cache, length):
    B, capacity, H, D = k_cache.shape
    config = llama.Config(width=H * D, depth=1, heads=H, kv_heads=H)
    cache = llama.KVCache(config, B, 0, q)
    cache.k, cache.v, cache.length = k_cache[None], v_cache[None], length   # views: one layer
    keys, values = cache.update(0, k, v)
    return attention(q, keys, values, causal, start=length)


def cache_cases():
    rng, cases = torch.Generator().manual_seed(7), []
    for B, H, D, capacity, length in ((1, 2, 8, 6, 3), (2, 1, 4, 5, 4), (1, 2, 4, 4, 0)):
        new = [torch.randn(B, 1, H, D, generator=rng) for _ in range(3)]
        caches = [torch.randn(B, capacity, H, D, generator=rng) for _ in range(2)]
        for cache in caches:
            cache[:, length:] = 3.0                     # left over from something else
        cases.append((*new, *caches, length))
    return cases


def with_caches(out, arguments):
    return out, arguments[3], arguments[4]


def step_that(write=0, first=0, last=1, scale=None):
    """A step that writes row length + write (None: no row) and sees rows first .. length + last."""
    def mistake(q, k, v, k_cache, v_cache, length):
        if write is not None:
            at = max(0, length + write)
            k_cache[:, at:at + 1], v_cache[:, at:at + 1] = k, v
        end = k_cache.shape[1] if last is None else length + last
        keys, values = k_cache[:, first:end], v_cache[:, first:end]
        scores = torch.einsum("bqhd,bkhd->bhqk", q, keys) * (scale or (lambda D: D ** -.5))(
            q.shape[-1])
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), values)
    return mistake


def unwritten(q, k, v, k_cache, v_cache, length):
    return cache_step(q, k, v, k_cache.clone(), v_cache.clone(), length)


def before_it_is_written(q, k, v, k_cache, v_cache, length):
    out = step_that(write=None)(q, k, v, k_cache, v_cache, length)
    k_cache[:, length:length + 1], v_cache[:, length:length + 1] = k, v
    return out


CACHE = Exercise(
    7, "ex07_cache_step.py", ("cache_step",), "KVCache.update in llama.py", cache_step,
    cache_cases,
    (("the output is right, but the caches are not written: the next step will miss this token",
      unwritten),
     ("off by one: the new token does not see itself, rows 0 to length are visible",
      step_that(last=0)),
     ("it sees the whole buffer: behind row `length` stands what something else has left",
      step_that(last=None)),
     ("off by one: the new row goes to length + 1, and row `length` is left as it was",
      step_that(write=1)),
     ("off by one: the new row goes over the last one that was written; the first free is `length`",
      step_that(write=-1)),
     ("the scores are not divided by sqrt(D)", step_that(scale=lambda D: 1.0)),
     ("the scores are divided by D: it is sqrt(D)", step_that(scale=lambda D: 1 / D)),
     ("it attends before the new row is written: write first", before_it_is_written),
     ("it attends, and nothing is written: neither the output nor the caches have the new row",
      step_that(write=None)),
     ("row 0 is not seen: rows 0 to length are visible", step_that(first=1))),
    ("output", "k_cache", "v_cache"), with_caches)


# ------------------------------------------------------------------------------ 12: two tiles

def two_tiles(q, k1, v1, k2, v2):
    """The attention of the project on both tiles at once, and the logarithm of its denominator."""
    k, v = torch.cat((k1, k2)), torch.cat((v1, v2))
    out = attention(q[None, :, None], k[None, :, None], v[None, :, None], full)
    return out[0, :, 0], torch.logsumexp(q @ k.T * q.shape[-1] ** -.5, -1)


def tile_cases():
    rng, cases = torch.Generator().manual_seed(12), []
    # how large the scores of each tile are: the second has the maximum, the first, both overflow
    for T, S1, S2, D, first, second in ((3, 4, 4, 8, 1, 3), (2, 5, 3, 4, 3, 1),
                                        (2, 3, 4, 4, 150, 900)):
        q, k1, v1, k2, v2 = (torch.randn(n, D, generator=rng) for n in (T, S1, S1, S2, S2))
        cases.append((q, first * k1, v1, second * k2, v2))
    return cases


def tiles_with(alpha_acc=True, alpha_l=True, inverse=False, shift=True, scale=True, lse=None,
               old=False):
    """The recurrence, with a part left out; lse(m, l) where it is not m + log l."""
    def mistake(q, k1, v1, k2, v2):
        m, l, acc = torch.full(q.shape[:1], -1e30), torch.zeros(len(q)), torch.zeros_like(q)
        for k, v in ((k1, v1), (k2, v2)):
            s = q @ k.T * (q.shape[-1] ** -.5 if scale else 1)
            higher = torch.maximum(m, s.amax(1)) if shift else torch.zeros_like(m)
            alpha = (higher - m if inverse and k is k2 else m - higher).exp()
            if not shift:
                alpha = torch.ones_like(m)
            p = (s - (m if old and k is k2 else higher)[:, None]).exp()
            l = (alpha if alpha_l else 1) * l + p.sum(1)
            acc = (alpha[:, None] if alpha_acc else 1) * acc + p @ v
            m = higher
        return acc / l[:, None], (lse or (lambda m, l: m + l.log()))(m, l)
    return mistake


def each_alone(weight):
    """Each tile's own softmax; weight: of the two outputs."""
    def mistake(q, k1, v1, k2, v2):
        out = 0
        for k, v in ((k1, v1), (k2, v2)):
            out = out + weight * (q @ k.T * q.shape[-1] ** -.5).softmax(-1) @ v
        return out, two_tiles(q, k1, v1, k2, v2)[1]
    return mistake


OVERFLOW = ("exp overflows: subtract the running maximum before exp, also of a later tile that is "
            "larger")


def first_maximum(q, k1, v1, k2, v2):
    """The maximum of the first tile for both: right as long as nothing overflows."""
    s1, s2 = (q @ k.T * q.shape[-1] ** -.5 for k in (k1, k2))
    m = s1.amax(1)
    p1, p2 = (s1 - m[:, None]).exp(), (s2 - m[:, None]).exp()
    l = p1.sum(1) + p2.sum(1)
    return (p1 @ v1 + p2 @ v2) / l[:, None], m + l.log()


def undivided(q, k1, v1, k2, v2):
    """acc without the division by l."""
    s = q @ torch.cat((k1, k2)).T * q.shape[-1] ** -.5
    return (s - s.amax(1, keepdim=True)).exp() @ torch.cat((v1, v2)), torch.logsumexp(s, -1)


TILES = Exercise(
    12, "ex12_online_softmax.py", ("two_tiles",), "fold and forward_kernel in kernels/attention.py",
    two_tiles, tile_cases,
    ((OVERFLOW, tiles_with(shift=False)),
     (OVERFLOW, first_maximum),
     ("acc is not corrected when the maximum grows: alpha goes to l and to acc",
      tiles_with(alpha_acc=False)),
     ("l is not corrected when the maximum grows: alpha goes to acc and to l",
      tiles_with(alpha_l=False)),
     ("nothing is corrected when the maximum grows: alpha = exp(m - m') is missing",
      tiles_with(alpha_acc=False, alpha_l=False)),
     ("alpha is upside down: it is exp(m - m'), at most 1", tiles_with(inverse=True)),
     ("the weights of the second tile are taken with the old maximum: exp(s - m')",
      tiles_with(old=True)),
     ("each tile has a softmax of its own, and the two are averaged: the tile with the larger "
      "scores must count more", each_alone(.5)),
     ("each tile has a softmax of its own, and the two are added: all weights of a row must add "
      "up to 1", each_alone(1.)),
     ("acc is not divided by l", undivided),
     ("the scores are not divided by sqrt(D)", tiles_with(scale=False)),
     ("lse lacks log l: it is m + log l", tiles_with(lse=lambda m, l: m)),
     ("lse lacks the maximum: it is m + log l", tiles_with(lse=lambda m, l: l.log())),
     ("lse is a logarithm to base 2: the kernel keeps that one, here it is the natural one",
      tiles_with(lse=lambda m, l: (m + l.log()) / math.log(2)))),
    ("out", "lse"))

EXERCISES = (ROPE, CACHE, TILES)
