"""OPT and T5 on the kernels, in Triton's interpreter: padding, caches, beams, a step of a graph.

tests/test_llms.py compares the specifications with transformers; here kernels and specification."""

import importlib

import pytest
import torch

from decoding.cuda_graph import DecodeStep
from generate import decode_steps, Sampler
from llama import KVCache
from llms.opt import Config as OptConfig
from llms.opt import Opt
from llms.t5 import Config as T5Config
from llms.t5 import T5
from tiny import gap, LIMIT, shaken

launch = importlib.import_module("kernels.launch")
MASK = torch.arange(9)[None] >= torch.tensor([[0], [4]])      # prompts of 9 and of 5, on the right


@pytest.fixture(scope="module")
def models():
    """Head sizes of 8 and 16; OPT-2.7b has 80, the others 64 and 128."""
    return {"opt": shaken(Opt(OptConfig(50, 32, 2, 4, 40, 64))),
            "t5": shaken(T5(T5Config(50, 32, 2, 2, 4, 16, 40, buckets=8, max_distance=20)))}


def draw(*shape, seed=0):
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(seed))


def both(monkeypatch, compute):
    """What is computed by kernels and by specifications."""
    with torch.no_grad():
        kernels = compute()
        monkeypatch.setattr(launch, "SPEC", True)
        spec = compute()
        monkeypatch.setattr(launch, "SPEC", False)
    return kernels, spec


def test_a_padded_batch(models, monkeypatch):
    opt = both(monkeypatch, lambda: models["opt"](draw(2, 9), attention_mask=MASK)[MASK])
    assert gap(*opt) <= LIMIT
    t5 = both(monkeypatch, lambda: models["t5"](draw(2, 9), draw(2, 5, seed=1), MASK))
    assert gap(*t5) <= LIMIT


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_one_token_after_another(models, monkeypatch, kind):
    llm = models[kind]

    def compute():
        x, found = llm.embed(draw(2, 9)), []
        cache = KVCache(llm.config, 2, 14, x, MASK)
        positions = (MASK.cumsum(1) - 1).clamp(min=0)
        for t in range(5):
            found.append(llm.next_logits(x, cache, positions))
            x, positions = draw(2, 1, seed=t), MASK.sum(1, keepdim=True) + t
        return torch.stack(found)
    assert gap(*both(monkeypatch, compute)) <= LIMIT


def test_beams_of_one_prompt(models, monkeypatch):
    """The decoder of a T5 has three rows, its prompt one."""
    llm = models["t5"]

    def compute():
        x = llm.embed(draw(1, 9))
        cache = KVCache(llm.config, 1, 14, x)
        llm.next_logits(x, cache)
        cache.reorder(torch.tensor([0, 0, 0]))
        return llm.next_logits(draw(3, 1), cache)
    assert gap(*both(monkeypatch, compute)) <= LIMIT


def test_the_step_of_a_cuda_graph_writes_the_same(models):
    """Of an OPT; the positions of the step are counted on the device."""
    llm, prompts = models["opt"], [[3, 4, 5], [6]]

    def begin():
        x, mask = llm.embed(draw(2, 9)), MASK
        cache = KVCache(llm.config, 2, 20, x, mask)
        return x, mask, cache, Sampler(llm, prompts, 8)
    with torch.inference_mode():
        x, mask, cache, sampler = begin()
        plain = list(decode_steps(llm, x, mask, cache, sampler, 4))
        x, mask, cache, sampler = begin()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        token = sampler(llm.next_logits(x, cache, positions, mask))[:, None]
        step = DecodeStep(llm, cache, sampler, token, mask.sum(1, keepdim=True))
        written = [token[:, 0].tolist()]
        for _ in range(3):
            step()
            written.append(step.token[:, 0].tolist())
    assert written == plain and len({tuple(row) for row in plain}) > 1
