"""kernels/decode.py in Triton's interpreter, against its specification in fp64."""

import importlib

import pytest
import torch

ours = importlib.import_module("kernels.decode")        # the module, whatever the package exports
decode, decode_spec = ours.decode, ours.decode_spec


def cache(B, S, H, G, D, dtype=torch.float32, spare=7, seed=0):
    """q, and k and v as a layer of llama.Cache shows them: NaN behind the S places written."""
    dice = torch.Generator().manual_seed(seed)
    whole = torch.full((2, B, S + spare, G, D), torch.nan, dtype=dtype)
    whole[:, :, :S] = torch.randn(2, B, S, G, D, generator=dice).to(dtype)
    q = torch.randn(B, 1, H, D, generator=dice).to(dtype)
    return q, *whole[:, :, :S]


def error(found, q, k, v, *facts):
    """Root mean square distance from the specification in fp64."""
    exact = decode_spec(q.double(), k.double(), v.double(), *facts)
    return float((found - exact).square().mean().sqrt())


def close(found, q, k, v, *facts):
    """The rule: at most twice the error of the specification in the same dtype."""
    return error(found, q, k, v, *facts) <= 2 * error(decode_spec(q, k, v, *facts), q, k, v, *facts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("B, S, H, G, D, splits", [
    (1, 1, 2, 2, 64, None),              # one key
    (2, 37, 4, 1, 88, 3),                # one key head for all; a head size that is no power of 2
    (1, 64, 4, 4, 64, 1),                # a whole tile, not split
    (2, 65, 8, 2, 16, 2),                # one key in the second chunk
    (1, 577, 4, 1, 128, 5), (3, 200, 6, 2, 8, 64)])     # more splits asked for than there are tiles
def test_equals_the_specification(B, S, H, G, D, splits, dtype):
    q, k, v = cache(B, S, H, G, D, dtype)
    found = decode(q, k, v, splits=splits)
    assert found.shape == q.shape and found.dtype == dtype
    assert close(found, q, k, v)


def test_ragged_lengths_and_left_padding():
    q, k, v = cache(4, 150, 4, 2, 32)
    lengths = torch.tensor([150, 1, 64, 65], dtype=torch.int32)     # row 1 sees one key
    assert close(decode(q, k, v, lengths=lengths, splits=3), q, k, v, None, lengths)
    room = torch.ones(4, 200, dtype=torch.bool)         # as llama.Cache.keep: rows of the capacity
    room[0, :149], room[1, :64], room[2, :65] = False, False, False
    attention_mask = room[:, :150]
    assert close(decode(q, k, v, attention_mask, splits=3), q, k, v, attention_mask)
    lengths[1:3] = torch.tensor([70, 140])
    found = decode(q, k, v, attention_mask, lengths, splits=3)
    assert close(found, q, k, v, attention_mask, lengths)
    assert not close(found, q, k, v, attention_mask) and not close(found, q, k, v, None, lengths)


def test_places_behind_the_length_are_not_read():
    q, k, v = cache(2, 100, 4, 2, 16)
    lengths = torch.tensor([40, 90], dtype=torch.int32)
    found = decode(q, k, v, lengths=lengths)
    for row, length in enumerate(lengths):
        k[row, length:], v[row, length:] = torch.nan, torch.inf
    assert torch.equal(decode(q, k, v, lengths=lengths), found)


def test_one_score_far_above_the_others_in_any_chunk():
    """The running maximum and the merge: 2^s of these scores is beyond fp32."""
    q, k, v = cache(1, 130, 2, 1, 16)
    for loud in (0, 64, 129):
        k2 = k.clone()
        k2[:, loud] = q[:, 0, :1] * 400
        found = decode(q, k2, v, splits=3)
        assert torch.isfinite(found).all() and close(found, q, k2, v)


def test_splits_change_nothing_but_rounding_and_repeat_bit_for_bit():
    q, k, v = cache(1, 300, 4, 2, 16)
    whole = decode(q, k, v, splits=1)
    for splits in (2, 5, 9):
        parts = decode(q, k, v, splits=splits)
        assert torch.equal(parts, decode(q, k, v, splits=splits))
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)


def test_chunks_weighed_alike_would_be_noticed():
    """Control: the mean of the chunks' answers is what a merge without its weights gives."""
    q, k, v = cache(1, 128, 2, 1, 16)
    k[:, :64] *= 3
    halves = [decode_spec(q, k[:, at], v[:, at]) for at in (slice(0, 64), slice(64, 128))]
    assert close(decode(q, k, v, splits=2), q, k, v)
    assert not close((halves[0] + halves[1]) / 2, q, k, v)


def test_a_view_of_q_and_one_wide_cache():
    """q cut out of a fused projection; a batch of one may have any batch stride."""
    q, k, v = cache(1, 50, 4, 2, 16)
    wide = torch.cat((q, torch.randn(1, 1, 4, 16)), dim=-1)
    assert close(decode(wide[..., :16], k, v), q, k, v)


def test_no_rows_are_no_launch(grounded):
    q, k, v = cache(2, 20, 4, 2, 16)
    assert decode(q[:0], k[:0], v[:0]).shape == (0, 1, 4, 16)
    lengths = torch.zeros(0, dtype=torch.int32)
    assert decode(q[:0], k[:0], v[:0], lengths=lengths).shape == (0, 1, 4, 16)


@pytest.mark.parametrize("B, G, slots, splits", [
    (1, 32, 216, 6), (1, 32, 264, 8), (8, 32, 264, 1), (3, 2, 216, 36), (1, 1, 216, 60)])
def test_no_more_programs_than_there_is_room_for(B, G, slots, splits, monkeypatch):
    """An A100 has 108 multiprocessors for two programs each, an H100 132. The cache has 360 tiles;
    a merge takes 64 parts at most, here 60 of 6 tiles."""
    grids = []

    class Watched:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **named: None
    monkeypatch.setattr(ours, "decode_chunk", Watched())
    monkeypatch.setattr(ours, "decode_merge", Watched())
    monkeypatch.setattr(ours, "INTERPRET", False)
    monkeypatch.setattr(ours, "processors", lambda device: slots // 2)
    q, k, v = cache(B, 360 * 32, G, G, 8)
    decode(q, k, v)
    assert grids[0] == (splits, G, B) and splits * G * B <= max(slots, G * B)


def test_what_it_refuses(grounded):
    q, k, v = cache(2, 20, 4, 2, 16)
    none = torch.zeros(2, 20, dtype=torch.bool)
    twelve = [t[..., :12].contiguous() for t in (q, k, v)]
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v)]
    for told, call in (
            ("queries", lambda: decode(q.repeat(1, 2, 1, 1), k, v)),
            ("H a multiple of G", lambda: decode(q[:, :, :3], k, v)),
            ("S > 0", lambda: decode(q, k[:, :0], v[:, :0])),
            ("head size 12", lambda: decode(*twelve)),
            ("float64", lambda: decode(q.double(), k.double(), v.double())),
            ("the same for all", lambda: decode(q.half(), k, v)),
            ("strides", lambda: decode(q, *turned)),
            ("on cpu, meta", lambda: decode(q, k.to("meta"), v.to("meta"))),
            ("on cpu, meta", lambda: decode(q, k, v, ~none.to("meta"))),
            ("(B, 1, H, D)", lambda: decode(q[0], k, v)),
            ("attention_mask torch.float32", lambda: decode(q, k, v, none.float())),
            ("rows [0, 1] see no key", lambda: decode(q, k, v, none)),
            ("rows [1] see no key", lambda: decode(q, k, v, lengths=torch.tensor(
                [3, 0], dtype=torch.int32))),
            ("lengths torch.int64", lambda: decode(q, k, v, lengths=torch.tensor([3, 4]))),
            ("no_grad", lambda: decode(q.clone().requires_grad_(), k, v)),
            ("bfloat16", lambda: decode(q.bfloat16(), k.bfloat16(), v.bfloat16()))):
        with pytest.raises(ValueError) as raised:
            call()
        said = str(raised.value)
        assert "\n" not in said and (told in said or told == "queries" and "(B, 1, H, D)" in said)
    with pytest.raises(AssertionError, match="launched"):               # control
        decode(q, k, v)
