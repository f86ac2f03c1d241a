"""The fixed step of generate.py with all of its kernels, in Triton's interpreter."""

import torch

import generate as g
import llama
from tiny import shaken
from decoding.cuda_graph import DecodeStep, StaticCache

SIZE = dict(vocab=40, width=32, depth=2, heads=4, kv_heads=2, mlp=48, context=64)


def fixed(llm, x, attention_mask, cache, sampler, count):
    """`decode_graph`, every step run."""
    cache.k.fill_(torch.nan)
    cache.v.fill_(torch.nan)
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    first = sampler(llm.next_logits(x, cache, position_ids, attention_mask))[:, None]
    step = DecodeStep(llm, cache, sampler, first, attention_mask.sum(1, keepdim=True))
    for n in range(count):
        if n:
            step()
        yield step.token[:, 0].tolist()


def test_fixed_step_with_kernels(monkeypatch):
    llm = shaken(llama.Llama(llama.Config(**SIZE)))
    prompts = [[1, 5, 7, 9, 30], [1, 8], [3, 3, 3]]
    every = lambda: g.generate_batch(llm, prompts, max_new_tokens=5)
    want = every()
    monkeypatch.setattr(g, "decode_steps", fixed)
    assert every() == want and len(set(map(tuple, want))) == 3
    hold = StaticCache.__init__

    def shown(memory, cache):
        hold(memory, cache)
        memory.k[:, :, memory.at + 1:], memory.v[:, :, memory.at + 1:] = 1, 9
        memory.end += 1
    monkeypatch.setattr(StaticCache, "__init__", shown)
    assert every() != want                                      # control: an unwritten place
