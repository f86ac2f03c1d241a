"""A sliding window in Triton's interpreter: attention forward and backward, decode, and a LLaMA."""

import importlib

import pytest
import torch

import llama
from decoding.cuda_graph import StaticCache
from kernels.attention import attention, causal, document_spans, seen_matrix, sliding_window
from test_attention import compare, inputs
from test_decode import cache, close
from test_llama import written
from tiny import LIMIT, gap, shaken, span_errors

decode, launch = (importlib.import_module(f"kernels.{name}") for name in ("decode", "launch"))


def band(rows, n):
    """The last n keys of each row, written out."""
    return torch.ones(rows, rows, dtype=torch.bool).tril().triu(1 - n)


def test_the_rule_is_a_band_and_its_spans_hold():
    q = torch.zeros(1, 9, 1, 8)
    assert torch.equal(seen_matrix(q, q, sliding_window, 3, 0, None, None), band(9, 3))
    assert span_errors(sliding_window, (sliding_window.keys, sliding_window.queries)) == 0
    # controls: one key too many, and too sure of the tiles that all see
    for keys in (lambda lo, hi, n, end: (lo - n + 2, hi, 0, 0),
                 lambda lo, hi, n, end: (lo - n + 1, hi, hi - n - 1, lo + 1)):
        assert span_errors(sliding_window, (keys, sliding_window.queries))


def test_spans_leave_work_out():
    """128 rows in tiles of 16 under a window of 32: at most three tiles a row of tiles."""
    spans = [sliding_window.keys(16 * i, 16 * i + 16, 32, 128) for i in range(8)]
    tiles = [-(-last // 16) - max(first, 0) // 16 for first, last, _, _ in spans]
    assert tiles == [1, 2, 3, 3, 3, 3, 3, 3]
    assert [inner // 16 for _, _, inner, _ in spans[2:]] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("T, S, H, G, D, n, start", [
    (70, 70, 2, 1, 64, 2, 0),
    (70, 70, 2, 1, 64, 33, 0), (97, 97, 1, 1, 88, 32, 0), (65, 65, 1, 1, 128, 31, 0),
    (130, 130, 1, 1, 16, 40, 0),            # whole tiles before the window
    (70, 70, 1, 1, 64, 200, 0),             # a window wider than the text
    (5, 100, 2, 1, 64, 40, 95)])            # behind a cache
def test_kernel_equals_double_precision(T, S, H, G, D, n, start):
    x = inputs(1, T, S, H, G, D)
    (out, *_), _ = compare(*x, sliding_window, n, start, None, None)
    same = torch.allclose(attention(*x[:3], causal, start=start), out, atol=1e-5)
    assert same == (n >= S)                                             # control: causal


def test_packed_documents_and_padding():
    x = inputs(2, 130, 130, 2, 1, 64)
    doc_spans = document_spans([[37, 1, 92], [100, 3, 27]])
    (out, *_), _ = compare(*x, sliding_window, 20, 0, None, doc_spans)
    alone = attention(*(t[:1, 38:] for t in x[:3]), sliding_window, 20)
    assert torch.allclose(out[:1, 38:], alone, atol=1e-6)
    assert not torch.allclose(attention(*x[:3], causal, doc_spans=doc_spans), out, atol=1e-2)
    attention_mask = torch.ones(2, 130, dtype=torch.bool)
    attention_mask[1, 50:60] = False
    compare(*x, sliding_window, 20, 0, attention_mask, None)
    compare(*x, sliding_window, 20, 0, attention_mask, doc_spans)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("n", [1, 37, 64, 149, 500])
def test_decode_sees_the_last_n_keys(n, dtype):
    q, k, v = cache(3, 150, 4, 2, 32, dtype)
    found = decode.decode(q, k, v, splits=3, allow=sliding_window, n=n)
    first = max(150 - n, 0)
    assert close(found, q, k[:, first:], v[:, first:])
    assert close(found, q, k, v) == (n >= 150)                          # control: all keys
    # the same where the device counts: other rows end elsewhere
    lengths = torch.tensor([150, 1, 90], dtype=torch.int32)
    attention_mask = torch.ones(3, 200, dtype=torch.bool)
    attention_mask[0, :100], attention_mask[2, :60] = False, False
    mask = attention_mask[:, :150], lengths
    got = decode.decode(q, k, v, *mask, splits=3, allow=sliding_window, n=n)
    for row, end in enumerate(lengths.tolist()):
        some = slice(max(end - n, 0), end)
        assert close(got[row:row + 1], q[row:row + 1], k[row:row + 1, some], v[row:row + 1, some],
                     attention_mask[row:row + 1, some])
    k2, v2 = k.clone(), v.clone()
    for row, end in enumerate(lengths.tolist()):        # what lies outside is not read
        for t in (k2, v2):
            t[row, :max(end - n, 0)], t[row, end:] = torch.nan, torch.nan
    assert torch.equal(decode.decode(q, k2, v2, *mask, splits=3, allow=sliding_window, n=n), got)


def test_decode_refuses_other_rules(grounded):
    q, k, v = cache(1, 20, 4, 2, 16)

    def odd(q, k, n):
        return k % 2 == 1
    for rule, n in ((odd, 0), (sliding_window, 0)):
        with pytest.raises(ValueError, match="it takes causal, or sliding_window"):
            decode.decode(q, k, v, allow=rule, n=n)


@pytest.mark.parametrize("held", [False, True])
def test_one_token_after_another_gives_the_logits_of_the_whole_row(held, monkeypatch):
    """A window of 4 in rows of 12 and 9 tokens, by the host's count and by the device's."""
    model = shaken(llama.Llama(llama.Config(vocab=50, width=32, depth=2, heads=4, kv_heads=2,
                                            mlp=40, window=4)))
    ids = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(0))
    attention_mask = torch.ones(2, 12, dtype=torch.bool)
    attention_mask[1, :3] = False
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        with monkeypatch.context() as plain:
            plain.setattr(launch, "SPEC", True)
            true = model(ids, position_ids=position_ids, attention_mask=attention_mask)[:, 6:]
        if held:
            room = llama.KVCache(model.config, 2, 20, model.embed.weight, attention_mask[:, :6])
            room.k.fill_(torch.nan), room.v.fill_(torch.nan)
            model(ids[:, :6], room, position_ids[:, :6])
            room = StaticCache(room)
            steps = [model(ids[:, t:t + 1], room, position_ids[:, t:t + 1]) for t in range(6, 12)]
            got = torch.cat(steps, 1)
        else:
            got = written(model, ids, attention_mask, 6)
    assert gap(got, true) < LIMIT
    model.config = model.config.__class__(**{**vars(model.config), "window": None})
    for block in model.blocks:
        block.c = model.config
    with torch.no_grad():
        assert gap(model(ids, position_ids=position_ids, attention_mask=attention_mask)[:, 6:], true) > 100 * LIMIT   # control
