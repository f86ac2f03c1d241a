"""A small LLaMA on the kernels, in Triton's interpreter: writing with a cache, and learning."""

import importlib

import pytest
import torch
import torch.nn.functional as F

import llama
from kernels import cached
from kernels.checkpoint import POLICIES
from tiny import LIMIT, gap, shaken

attention, decode, launch = (importlib.import_module(f"kernels.{name}") for name in (
    "attention", "decode", "launch"))
DEPTH = 2


@pytest.fixture
def runs(monkeypatch):
    """How often each of them runs as a kernel."""
    counts = dict.fromkeys(("attention", "decode"), 0)

    def counted(file, name, kernel):
        class Counted:
            def __getitem__(self, grid):
                counts[name] += 1
                return kernel[grid]
        monkeypatch.setattr(file, kernel.__name__, Counted())

    counted(attention, "attention", attention.forward_kernel)
    counted(decode, "decode", decode.decode_chunk)
    return counts


@pytest.fixture(scope="module")
def model():
    """Two query heads to a key head."""
    return shaken(llama.Llama(llama.Config(vocab=50, width=32, depth=DEPTH, heads=4, kv_heads=2,
                                           mlp=40)))


def draw(*shape):
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(0))


def written(model, ids, attention_mask, prompt):
    """Logits of the places behind the prompt, fed one by one with a cache."""
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    cache = llama.KVCache(model.config, len(ids), ids.shape[1], model.embed.weight,
                        attention_mask[:, :prompt])
    model(ids[:, :prompt], cache, position_ids[:, :prompt])
    return torch.cat([model(ids[:, t:t + 1], cache, position_ids[:, t:t + 1])
                      for t in range(prompt, ids.shape[1])], 1).detach()


def test_one_token_after_another_gives_the_logits_of_the_whole_row(model, runs, monkeypatch):
    """Rows of 9 and 5 tokens, the second padded on the left; the last 4 are written."""
    ids, attention_mask = draw(2, 9), torch.ones(2, 9, dtype=torch.bool)
    attention_mask[1, :4] = False
    with torch.no_grad():
        with monkeypatch.context() as plain:                # PyTorch's own operations, no cache
            plain.setattr(launch, "SPEC", True)
            true = model(ids, position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0), attention_mask=attention_mask)[:, 5:]
        assert runs == {"attention": 0, "decode": 0}
        assert gap(written(model, ids, attention_mask, 5), true) < LIMIT
        assert runs == {"attention": DEPTH, "decode": 4 * DEPTH}        # the prompt, the tokens
        # control: a decode that does not know of padding
        blind = decode.decode
        monkeypatch.setattr(cached, "decode",
                            lambda q, k, v, attention_mask, **rule: blind(q, k, v))
        far = written(model, ids, attention_mask, 5)
        assert gap(far[:1], true[:1]) < LIMIT and gap(far[1:], true[1:]) > 100 * LIMIT


def test_where_gradients_may_be_wanted_attention_runs(model, runs):
    """decode has none. Numbers are the same."""
    ids, attention_mask = draw(1, 4), torch.ones(1, 4, dtype=torch.bool)
    with torch.no_grad():
        fast = written(model, ids, attention_mask, 3)
    assert runs == {"attention": DEPTH, "decode": DEPTH}
    assert gap(written(model, ids, attention_mask, 3), fast) < LIMIT
    assert runs == {"attention": 3 * DEPTH, "decode": DEPTH}


def test_gradients_of_the_kernels_are_the_specifications_under_every_policy(model, runs,
                                                                            monkeypatch):
    ids, found = draw(2, 7), {}
    attention_mask = torch.arange(7) < torch.tensor([[7], [5]])

    def gradients():
        model.zero_grad()
        loss = F.cross_entropy(model(ids, attention_mask=attention_mask)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    for policy in POLICIES:
        runs["attention"] = 0
        monkeypatch.setattr(model, "checkpoint", policy, raising=False)
        found[policy] = gradients()
        assert all(map(torch.equal, found[policy], found[None])), policy
        assert runs["attention"] == DEPTH * (2 if policy == "full" else 1), policy
    monkeypatch.setattr(launch, "SPEC", True)
    spec = gradients()
    assert all(gap(a, b) < LIMIT for a, b in zip(found[None], spec))
    assert not all(map(torch.equal, found[None], spec))     # control: they were not the same code
