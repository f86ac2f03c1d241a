"""exercises.of_llama: exercises 6, 7 and 12, inside the decoder's attention.

For each: the project's own function in the exercise's signature, small inputs, classic mistakes.
"""
import math

import torch

import llama
from exercises.checking import ANY, Exercise, parts_of
from kernels import attention, causal, rope_table
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


# ------------------------------------------------------------------------------ 12: tiles

def fold_all(function, arguments):
    """`fold` over the tiles, of which no call sees two, then `finish` -> out, lse."""
    q, tiles = arguments
    state = {"m": torch.full((len(q), 1), -math.inf), "l": torch.zeros(len(q), 1),
             "acc": torch.zeros_like(q)}
    for k, v in tiles:
        found = function("fold", q, k, v, *state.values())
        state = dict(zip(state, parts_of("fold", found, state)))
    like = {"out": state["acc"], "lse": state["m"]}
    return parts_of("finish", function("finish", *state.values()), like)


def tile_cases():
    rng, cases = torch.Generator().manual_seed(12), []

    def tile(S, D, scale):
        return scale * torch.randn(S, D, generator=rng), torch.randn(S, D, generator=rng)
    # (T, D) and, for each tile, its keys and how large its scores are: the maximum in the second,
    # in the first, so large that exp overflows, and three tiles
    for T, D, sizes in ((3, 8, ((4, 1), (4, 3))), (2, 4, ((5, 3), (3, 1))),
                        (2, 4, ((3, 150), (4, 900))), (3, 4, ((2, 2), (5, 1), (3, 4)))):
        q = torch.randn(T, D, generator=rng)
        cases.append((q, [tile(S, D, scale) for S, scale in sizes]))
    # scores near 400, then near -400: a maximum that falls would make alpha overflow. Those of the
    # second row are ten times smaller: beside the first row's maximum exp would leave nothing
    q, (k1, v1), (k2, v2) = torch.tensor([[1.], [.1]]).expand(2, 4), tile(3, 4, 1), tile(4, 4, 1)
    return [*cases, (q, [(k1 + 200, v1), (k2 - 200, v2)])]


def tiles_with(maximum=torch.maximum, alpha=lambda m, new: (m - new).exp(),
               shift=lambda m, new: new, on_l=True, on_acc=True, scale=True,
               finish=lambda m, l, acc: (acc / l, m + l.log())):
    """`fold` and `finish` as the kernel's formulas say it, or with one part changed."""
    def fold(q, k, v, m, l, acc):
        s = q @ k.T * (q.shape[-1] ** -.5 if scale else 1)              # (T, S)
        new = maximum(m, s.amax(1, keepdim=True))
        factor, p = alpha(m, new), (s - shift(m, new)).exp()
        l = (factor if on_l else 1) * l + p.sum(1, keepdim=True)
        return new, l, (factor if on_acc else 1) * acc + p @ v

    def function(name, *arguments):
        return {"fold": fold, "finish": finish}[name](*arguments)
    return function


def each_alone(finish):
    """Each tile has a softmax of its own; l counts the tiles. lse may be anything."""
    def function(name, *arguments):
        if name == "finish":
            return finish(*arguments), ANY
        q, k, v, m, l, acc = arguments
        return m, l + 1, acc + (q @ k.T * q.shape[-1] ** -.5).softmax(-1) @ v
    return function


def divided_twice(name, *arguments):
    found = tiles_with()(name, *arguments)
    if name == "finish":
        return found
    m, l, acc = found
    return m, l, acc / l


def with_lse(lse):
    return tiles_with(finish=lambda m, l, acc: (acc / l, lse(m, l)))


OVERFLOW = ("exp overflows: subtract the running maximum before exp, also of a later tile that is "
            "larger")
BASE_2 = ("lse is a logarithm to base 2: the kernel keeps that one, here it is the natural one, "
          "m + l.log()")
TILES = Exercise(
    12, "ex12_online_softmax.py", ("fold", "finish"),
    "fold and forward_kernel in kernels/attention.py", tiles_with(), tile_cases,
    # this one first: it fails on the last input alone, where others overflow, too
    (("m' is the maximum of the new tile alone: it is max(m, .), or alpha overflows when a tile "
      "has much smaller scores than those before", tiles_with(maximum=lambda m, top: top)),
     (OVERFLOW, tiles_with(maximum=lambda m, top: torch.zeros_like(top))),
     (OVERFLOW, tiles_with(maximum=lambda m, top: top.where(m.isinf(), m))),
     ("the maximum is that of all rows: each row has its own, or exp leaves nothing of a row "
      "with small scores", tiles_with(maximum=lambda m, top: torch.maximum(m, top).amax(
          0, keepdim=True).expand_as(top))),
     ("acc is not corrected when the maximum grows: alpha goes to l and to acc",
      tiles_with(on_acc=False)),
     ("l is not corrected when the maximum grows: alpha goes to acc and to l",
      tiles_with(on_l=False)),
     ("nothing is corrected when the maximum grows: alpha = exp(m - m') is missing",
      tiles_with(on_l=False, on_acc=False)),
     ("alpha is upside down: it is exp(m - m'), at most 1",
      tiles_with(alpha=lambda m, new: (new - m).exp())),
     ("the weights of a tile are taken with the old maximum: exp(s - m')",
      tiles_with(shift=lambda m, new: m)),
     ("each tile has a softmax of its own, and these are averaged: the tile with the larger "
      "scores must count more", each_alone(lambda m, l, acc: acc / l)),
     ("each tile has a softmax of its own, and these are added: all weights of a row must add "
      "up to 1", each_alone(lambda m, l, acc: acc)),
     ("acc is divided by l in every tile: divide once, in `finish`", divided_twice),
     ("acc is not divided by l", tiles_with(finish=lambda m, l, acc: (acc, m + l.log()))),
     ("the scores are not divided by sqrt(D)", tiles_with(scale=False)),
     ("lse lacks log l: it is m + log l", with_lse(lambda m, l: m)),
     ("lse lacks the logarithm: it is m + log l", with_lse(lambda m, l: m + l)),
     ("lse lacks the maximum: it is m + log l", with_lse(lambda m, l: l.log())),
     (BASE_2, with_lse(lambda m, l: m + l.log2())),
     (BASE_2, with_lse(lambda m, l: (m + l.log()) / math.log(2)))),
    ("out", "lse"), run=fold_all)

EXERCISES = (ROPE, CACHE, TILES)
