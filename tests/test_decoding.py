"""Decoding: the fixed step, penalties, stop texts, weights, where words looked, bad input."""
import contextlib
import copy
import gc
import importlib
import json
import math
import sys
from pathlib import Path
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import data
import generate as g
import llama
import projector
from kernels import cached, quantize as q
from test_generate import TONGUE, asked, folder, inside, args_for, model, pixels, soft, words
from tiny import gap, LIMIT
from decoding.attention_map import attention_to_patches, mean_inside_box
from decoding import cuda_graph, loading
from decoding.cuda_graph import DecodeStep, StaticCache, capture_stream, decode_graph
from decoding.flags import parse, prompt_error
from decoding.loading import load_model, prepare_for_inference
from formats import errors, files
from formats.errors import UsageError, UserError
from toy.world import draw, make_scene
from trainer.build import new_vlm

__all__ = ["folder", "inside", "model", "pixels", "words"]          # fixtures


# ------------------------------------------------------------------------------- the fixed step

@pytest.fixture
def replays(monkeypatch):
    """A function: from now on `generate` decodes as on a GPU, on a stand-in for torch.cuda. What is
    recorded does not run, a replay runs it. Unwritten cache is NaN. Returns what was counted."""
    run = DecodeStep.__call__
    counts = SimpleNamespace(run=0, recorded=0, replayed=0)

    class Graph:
        def replay(self):
            counts.replayed += 1
            run(self.step)

    def call(step):
        if counts.graph is None:
            counts.run += 1
            run(step)
        else:
            counts.recorded += 1
            counts.graph.step = step

    @contextlib.contextmanager
    def graph(it, stream, capture_error_mode):
        counts.graph = it
        yield
        counts.graph = None

    class Unwritten(llama.KVCache):
        def __init__(self, *args):
            super().__init__(*args)
            self.k.fill_(torch.nan)
            self.v.fill_(torch.nan)

    def go():
        counts.graph = None
        waits = SimpleNamespace(wait_stream=lambda other: None)
        event = SimpleNamespace(record=lambda stream: None, synchronize=lambda: None)
        capture_stream.cache_clear()
        cuda_graph.KEPT.clear()
        for name, it in {"Stream": lambda device: waits, "current_stream": lambda *device: waits,
                         "stream": lambda it: contextlib.nullcontext(), "Event": lambda: event,
                         "CUDAGraph": Graph, "graph": graph}.items():
            monkeypatch.setattr(torch.cuda, name, it)
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: t)
        monkeypatch.setattr(DecodeStep, "__call__", call)
        monkeypatch.setattr(g, "KVCache", Unwritten)
        monkeypatch.setattr(g, "decode_steps", decode_graph)
        return counts
    return go


def four(model, pixels):
    """Prompts of different lengths with one picture, none, two, one."""
    words = model.tokenizer
    two = [*asked(model, "And?"), data.IMAGE, *words.encode(" twice", bos=False)]
    return ([asked(model, "What is it?"), words.encode("Text only"), two,
             asked(model, "Where, and why is it there at all?")],
            [pixels[0], None, pixels[:2, 0], pixels[2]])


STEPS = [{}, {"temperature": 1.0, "seed": 5}, {"temperature": .7, "top_k": 40, "top_p": .9},
         {"repetition_penalty": 1.4}]


@pytest.mark.parametrize("settings, codes", [*((s, None) for s in STEPS), ({}, 8), ({}, 4)])
def test_the_fixed_step_says_the_same(model, pixels, replays, settings, codes):
    if codes:
        model = copy.deepcopy(model)
        q.quantize(model.llm, codes)
    prompts, pictures = four(model, pixels)
    every = lambda: g.generate_batch(model, prompts, pictures, max_new_tokens=12, **settings)
    alone = lambda: list(g.generate(model, prompts[0], pictures[0], 12, **settings))
    together, single = every(), alone()
    counts = replays()
    assert every() == together and len(set(map(tuple, together))) == 4
    assert (counts.run, counts.recorded, counts.replayed) == (2, 1, 9)
    assert alone() == single
    # the last one is kept: the same again is replayed from the second token on
    before = counts.recorded, counts.run
    assert alone() == single and (counts.recorded, counts.run) == before
    assert every() == together and counts.recorded == before[0] + 1     # another shape


def test_a_kept_step_is_used_only_where_all_is_equal(model, pixels, replays, monkeypatch):
    model = copy.deepcopy(model)
    ids, longer = asked(model, "What is it?"), asked(model, "What is it, then?")
    settings = {"temperature": 1.0}

    def say(ids=ids, picture=0, seed=1, **other):
        return list(g.generate(model, ids, pixels[picture], 12, seed=seed, eos=-1, **settings,
                               **other))
    want = {(picture, seed): say(picture=picture, seed=seed)
            for picture in (0, 2) for seed in (1, 2)}
    other = say(longer), say(top_k=5)
    counts = replays()
    for (picture, seed), answer in want.items():            # other pictures, other random numbers
        assert say(picture=picture, seed=seed) == answer
    assert counts.recorded == 1
    assert (say(longer), say(top_k=5)) == other and counts.recorded == 3
    # two answers that take turns have a step each
    first, second = (iter(g.generate(model, ids, pixels[n], 12, seed=1, eos=-1, **settings))
                     for n in (0, 2))
    both = [token for pair in zip(first, second) for token in pair]
    assert (both[::2], both[1::2]) == (want[0, 1], want[2, 1])
    # weights in another place: what was recorded reads the old ones
    recorded = counts.recorded
    assert say() == want[0, 1] and counts.recorded == recorded
    head = model.llm.head
    head.weight = torch.nn.Parameter(head.weight.detach().flip(0).contiguous())
    assert say() != want[0, 1] and counts.recorded == recorded + 1
    # a large cache is not kept, and a model that has gone takes its step with it
    assert model.llm in cuda_graph.KEPT
    monkeypatch.setattr(cuda_graph, "KEPT_BYTES", 1)
    say()
    assert model.llm not in cuda_graph.KEPT
    monkeypatch.setattr(cuda_graph, "KEPT_BYTES", 2 ** 30)
    say()
    alive = weakref.ref(model.llm)
    del model, head, first, second
    gc.collect()
    assert alive() is None and not len(cuda_graph.KEPT)


@pytest.mark.parametrize("wrong", ["place", "end", "token", "step"])
def test_a_step_that_does_not_move_on_is_seen(model, pixels, replays, monkeypatch, wrong):
    """Controls: a place, a random number or a token that stays; an end that shows more."""
    prompts, pictures = four(model, pixels)
    settings = {"temperature": 1.0} if wrong == "step" else {}
    every = lambda: g.generate_batch(model, prompts, pictures, max_new_tokens=12, **settings)
    want = every()
    replays()
    run, hold = DecodeStep.__call__, StaticCache.__init__

    def call(step):
        before = step.token.clone()
        run(step)
        if wrong == "place":
            step.position -= 1
        if wrong == "token":
            step.token.copy_(before)
        if wrong == "step":
            step.sampler.step -= 1

    def shown(memory, cache):
        hold(memory, cache)
        memory.k[:, :, memory.at + 1:], memory.v[:, :, memory.at + 1:] = 1, 9
        memory.end += wrong == "end"
    monkeypatch.setattr(DecodeStep, "__call__", call)
    monkeypatch.setattr(StaticCache, "__init__", shown)
    monkeypatch.setattr(cuda_graph, "SPEC", True)                        # all steps run here
    assert every() != want
    wrong = None
    assert every() == want


def test_ends_and_rooms_of_the_fixed_step(model, words, replays):
    prompts = [words.encode(t) for t in ("a", "A longer text", "bc", "x" * 690)]
    free = g.generate_batch(model.llm, prompts, max_new_tokens=14)
    end, ready = free[0][6], free[1][2]
    kinds = {"eos": end}, {"eos": ready}, {}
    want = [g.generate_batch(model.llm, prompts, max_new_tokens=14, **kw) for kw in kinds]
    first = [list(g.generate(model.llm, prompts[0], None, n, eos=end)) for n in (1, 2, 3, 4, 9)]
    counts = replays()
    assert [g.generate_batch(model.llm, prompts, max_new_tokens=14, **kw) for kw in kinds] == want
    assert [list(g.generate(model.llm, prompts[0], None, n, eos=end))
            for n in (1, 2, 3, 4, 9)] == first
    said = len(first[-1])
    counts.run = counts.recorded = counts.replayed = 0
    assert list(g.generate(model.llm, prompts[0], None, 50, eos=end)) == first[-1]
    assert counts.run + counts.replayed == said + 1                 # one step for nothing
    counts.run = counts.recorded = 0
    cuda_graph.KEPT.clear()
    list(g.generate(model.llm, prompts[0], None, 50, eos=first[-1][1]))
    assert (counts.run, counts.recorded) == (1, 0)              # a short answer: none is recorded


def test_nan_in_a_later_step(model, replays):
    said = list(g.generate(model.llm, [1, 70, 80], None, 12))
    at = next(i for i in range(5, 12) if said[i] not in said[:i])
    broken = copy.deepcopy(model.llm)
    with torch.no_grad():
        broken.embed.weight[said[at]] = torch.nan
    for way in (lambda: None, replays):
        way()
        for settings in ({}, {"temperature": 1.0, "top_k": 1, "repetition_penalty": 1.0001}):
            seen = []
            with pytest.raises(data.BadModel, match="not a number"):
                for token in g.generate(broken, [1, 70, 80], None, 12, **settings):
                    seen.append(token)
            assert seen == said[:at + 1]


class Launches(TorchDispatchMode):
    """Every operation with the shapes it is given; none may ask for a value."""
    def __init__(self):
        super().__init__()
        self.list = []

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        assert f not in (torch.ops.aten._local_scalar_dense.default,
                         torch.ops.aten.nonzero.default, torch.ops.aten.is_nonzero.default), f
        self.list.append((str(f), *(tuple(a.shape) for a in args if torch.is_tensor(a))))
        return f(*args, **kwargs or {})


@pytest.mark.parametrize("settings", STEPS)
@torch.no_grad()                # in inference mode whole functions are seen, not what they are of
def test_a_step_launches_the_same_and_asks_nothing(model, pixels, monkeypatch, settings):
    """No value goes to the host and no shape changes: what a CUDA graph needs of PyTorch's part."""
    monkeypatch.setattr(importlib.import_module("kernels.decode"), "check", lambda *_: None)
    prompts, pictures = four(model, pixels)
    llm, x, attention_mask, _ = g.prefill_inputs(model, prompts, pictures, 9)
    settings = {"penalty" if k[0] == "r" else k: v for k, v in settings.items()}
    sampler = g.Sampler(llm, prompts, 9, **settings)
    cache = llama.KVCache(llm.config, 4, x.shape[1] + 9, x, attention_mask)
    lengths = attention_mask.sum(1, keepdim=True)
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    token = sampler(llm.next_logits(x, cache, position_ids, attention_mask))[:, None]

    def launches(run):
        with Launches() as seen:
            run()
        return seen.list
    kept = copy.deepcopy(cache)
    grows = lambda: llm.next_logits(token, kept, lengths)
    assert launches(grows) != launches(grows)                           # control: today's way
    with pytest.raises(AssertionError), Launches():
        token[0].item()                                                 # control
    step = DecodeStep(llm, cache, sampler, token, lengths)
    state = step.token, step.position, step.cache.at, step.cache.end, cache.k, cache.v
    where = [t.data_ptr() for t in state]
    first = launches(step)
    assert len(first) > 50 and launches(step) == first == launches(step)
    assert [t.data_ptr() for t in state] == where
    assert step.cache.end.tolist() == [x.shape[1] + 4] * 4


def test_what_cannot_be_recorded_says_so(model, replays, monkeypatch):
    """The step's own reason, and the stream that was current before: torch.cuda.graph ends with an
    error of its own then, and stays on its stream."""
    replays()
    back = []

    class Refuses:
        def __init__(self, *_, **__):
            pass

        def __enter__(self):
            raise_at.append(1)

        def __exit__(self, *_):
            raise_at.clear()
            raise RuntimeError("failed due to a previous error")
    raise_at, run = [], DecodeStep.__call__

    def step(self):
        if raise_at:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        run(self)
    monkeypatch.setattr(DecodeStep, "__call__", step)
    monkeypatch.setattr(torch.cuda, "graph", Refuses)
    monkeypatch.setattr(torch.cuda, "set_stream", back.append)
    with pytest.raises(UserError, match="capturing.: set KERNELS=spec"):
        list(g.generate(model.llm, [1, 70], None, 9))
    assert back == [torch.cuda.current_stream()]
    monkeypatch.setattr(cuda_graph, "SPEC", True)
    assert len(list(g.generate(model.llm, [1, 70], None, 9))) == 9


def test_a_held_cache_takes_one_token_at_a_time(model):
    cache = llama.KVCache(model.llm.config, 1, 9, model.llm.embed.weight)
    with torch.no_grad():
        model.llm(torch.tensor([[1, 70, 80]]), cache)
        cache = StaticCache(cache)
        with pytest.raises((RuntimeError, IndexError)):
            model.llm.hidden(torch.tensor([[1, 70]]), cache, torch.tensor([[3, 4]]))


# --------------------------------------------------------------------- penalties and stop texts

@pytest.mark.parametrize("beams", [1, 3])
def test_penalty_is_that_of_transformers(tmp_path, beams):
    transformers = pytest.importorskip("transformers")
    differ = 0
    for seed in range(6):
        tiny = soft(12, seed)
        tiny.save_pretrained(tmp_path)
        theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
        for penalty in (1.5, .7):
            row = theirs.generate(torch.tensor([[1, 5, 7]]), max_new_tokens=12, num_beams=beams,
                                  do_sample=False, eos_token_id=2, pad_token_id=0,
                                  repetition_penalty=penalty)[0, 3:].tolist()
            ours, free = (list(g.generate(tiny, [1, 5, 7], None, 12, num_beams=beams, eos=2, **kw))
                          for kw in ({"repetition_penalty": penalty}, {}))
            assert ours == (row[:row.index(2)] if 2 in row else row)
            differ += ours != free
    assert differ > 3                                               # control: the penalty matters


def test_penalty_in_a_batch_is_that_of_each_row(model, pixels):
    prompts = [asked(model, "What?"), model.tokenizer.encode("Text only, and longer")]
    pictures, kw = [pixels[0], None], {"repetition_penalty": 1.4}
    single = [list(g.generate(model, p, x, 12, **kw)) for p, x in zip(prompts, pictures)]
    assert g.generate_batch(model, prompts, pictures, max_new_tokens=12, **kw) == single
    assert g.generate_batch(model, prompts, pictures, max_new_tokens=12) != single      # control


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"temperature": 1.0}])
def test_stop_texts_cut_where_they_begin(model, pixels, settings):
    ids = asked(model, "What is it?")
    free = model.tokenizer.decode(g.generate(model, ids, pixels[0], 24, **settings))
    stop = next(free[i:i + 3] for i in range(5, 20) if " " not in free[i:i + 3])
    answer = lambda *stops: model.tokenizer.decode(g.generate(model, ids, pixels[0], 24, stop=stops,
                                                        **settings))
    said = answer("\x01", stop)
    if not settings.get("num_beams"):           # of beams, an early end makes others win
        assert said == free[:free.index(stop)]
        assert said == model.tokenizer.decode(g.generate(model, ids, pixels[0], 24, stop=stop,
                                                     **settings))   # one text is one, not letters
    assert stop not in said
    assert answer("\x01") == free                                     # control


def test_stop_texts_may_begin_with_a_space():
    """Decoding drops a text's first space. Every beginning, in English; a token that holds more
    than the stop text goes with it."""
    toy = Path(g.__file__).parent / "toy/weights"
    model = new_vlm(toy / "clip", toy / "llama")
    ids = model.tokenizer.encode("This picture has a")
    answer = lambda *stop, **more: model.tokenizer.decode(
        g.generate(model, ids, None, 16, eos=-1, stop=stop, **more))
    free = answer()
    assert free.count(" ") > 5
    for n in (1, 4):
        for i in range(1, len(free) - n, 3):
            stop = free[i:i + n]
            said, text = answer(stop), " " + free             # it goes on behind a word
            whole = text[:text.index(stop)].removeprefix(" ")
            assert stop not in said and whole.startswith(said)
            assert stop[0] != " " or said == whole
    second = free.split(" ")[1]
    assert answer(" " + second, num_beams=2) in ("", answer(num_beams=2).split(" ")[0])


def test_stop_texts_need_words(model):
    for stop, who in (([""], model), (["a"], model.llm)):
        with pytest.raises(UsageError):
            next(g.generate(who, [1], stop=stop))


@pytest.mark.parametrize("settings, allowed", [({"top_k": 3}, (1, 2, 4)), ({"top_p": .7}, (1, 2))])
def test_counts_of_what_is_left(settings, allowed):
    """Chi-square of 20,000 draws against the softmax over what top-k or top-p leaves."""
    logits, n = torch.tensor([0., 2., 1., -1., .5]), 20000
    drawn = g.sample(logits.expand(n, 5), g.uniforms(0, 1, n)[:, 0], 1.0, **settings)
    counts = torch.bincount(drawn, minlength=5)
    left = torch.full_like(logits, -math.inf)
    left[list(allowed)] = logits[list(allowed)]
    want = left.softmax(0) * n
    assert counts[want == 0].sum() == 0
    there = want > 0
    off = lambda want: float(((counts - want)[there] ** 2 / want[there]).sum())
    assert off(want) < 13.9                                         # p = .001 with 2 d.f.
    assert off(logits.softmax(0) * n) > 100                         # control: nothing left out


# ------------------------------------------------------------------------- layouts and codes

def test_laid_weights_say_the_same(model, pixels, folder):
    loaded = projector.VLM.from_pretrained(folder / "model")
    ids = asked(loaded, "What is it?")
    before = list(g.generate(loaded, ids, pixels[0], 16))
    logits = loaded(torch.tensor([ids]), pixels[0]).detach()
    prepare_for_inference(loaded)
    assert any(isinstance(part, q.Laid) for part in loaded.modules())
    with torch.inference_mode():
        assert gap(loaded(torch.tensor([ids]), pixels[0]), logits) < LIMIT
    assert list(g.generate(loaded, ids, pixels[0], 16)) == before
    both = g.generate_batch(loaded, [ids] * 2, [pixels[0], pixels[1]], max_new_tokens=16)
    assert both[0] == before != both[1]
    laid = next(part for part in loaded.modules() if isinstance(part, q.Laid))
    laid.weight[0, 0] += 1                                          # control: columns are read
    row = torch.ones(1, laid.weight.shape[1])
    assert gap(laid(row), laid(row.repeat(2, 1))[:1]) > LIMIT


@torch.no_grad()
def test_bf16_in_blocks(monkeypatch):
    """As near to fp64 as PyTorch's own product in bf16; laid only where the CPU is quick at it."""
    rng = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(96, 40).bfloat16()
    laid = q.Laid(linear)
    for rows in (1, 3, 20):
        x = torch.randn(2, rows, 96, generator=rng).bfloat16()[:1]
        exact = F.linear(x.double(), linear.weight.double(), linear.bias.double())
        off = lambda y: float((y - exact).abs().max())
        assert laid(x).dtype == torch.bfloat16 and off(laid(x)) <= 2 * off(linear(x))
        assert off(laid(x.roll(1))) > .1                                # control
    for fast, kind in ((True, q.Laid), (False, torch.nn.Linear)):
        monkeypatch.setattr(q, "fast_bf16", lambda: fast)
        loaded = q.lay(torch.nn.Sequential(torch.nn.Linear(8, 8)).bfloat16())
        assert type(loaded[0]) is kind
    monkeypatch.undo()
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert not q.fast_bf16()


def test_bf16_cache_on_a_cpu():
    """Attention of one query: at most twice the error of the specification in bf16."""
    kernel, rng = importlib.import_module("kernels.decode"), torch.Generator().manual_seed(0)
    query, keys, values = (torch.randn(2, n, heads, 16, generator=rng).bfloat16()
                           for n, heads in ((1, 4), (37, 2), (37, 2)))
    attention_mask = torch.arange(37) >= torch.tensor([[0], [9]])
    exact = kernel.decode_spec(query.double(), keys.double(), values.double(), attention_mask)
    off = lambda y: float((y - exact).norm())
    found = kernel.decode(query, keys, values, attention_mask)
    assert found.dtype == torch.bfloat16
    assert off(found) <= 2 * off(kernel.decode_spec(query, keys, values, attention_mask))
    assert off(kernel.decode(query, keys, values)) > 10 * off(found)        # control: padding seen


@pytest.mark.parametrize("kind, fast, becomes", [
    ("float16", True, "bfloat16"), ("float16", False, "float32"), ("bfloat16", True, "bfloat16"),
    ("bfloat16", False, "float32"), ("float32", True, "float32"), ("float32", False, "float32")])
def test_dtype_auto_on_a_cpu(model, pixels, tmp_path, monkeypatch, capsys, kind, fast, becomes):
    copy.deepcopy(model).to(getattr(torch, kind)).save_pretrained(tmp_path)
    monkeypatch.setattr(loading, "fast_bf16", lambda: fast)
    line = ["x.png", "hi", "--model", str(tmp_path), "--device", "cpu"]
    loaded = load_model(parse(line))
    assert {str(p.dtype) for p in loaded.parameters()} == {f"torch.{becomes}"}
    assert capsys.readouterr().err.count("\n") == (kind != becomes)
    assert len(list(g.generate(loaded, asked(loaded, "Hi"), pixels[0], 5))) == 5
    asked_for = load_model(parse([*line, "--dtype", "fp16"]))         # control: a flag is obeyed
    assert asked_for.llm.embed.weight.dtype == torch.float16


def test_cache_knows_whether_anything_is_padded():
    config = llama.Config(vocab=8, context=64, **TONGUE)
    like, attention_mask = torch.zeros(1), torch.tensor([[True] * 3, [False, True, True]])
    assert llama.KVCache(config, 2, 8, like).attention_mask is None
    assert llama.KVCache(config, 2, 8, like, attention_mask[:1].expand(2, 3)).attention_mask is None
    padded = llama.KVCache(config, 2, 8, like, attention_mask)
    assert padded.attention_mask.sum() == 15
    padded.k.zero_()
    padded.k[:, 1], padded.length = 1, 3
    padded.reorder(torch.tensor([1, 1]))
    assert padded.k[:, 0, :3].eq(1).all()


# ---------------------------------------------------------------------------- where words looked

def test_looked_is_the_attention_of_the_model(model, pixels, monkeypatch):
    """The recomputed probabilities, applied to the values, are what the layer's attention gave."""
    ids = asked(model, "What is it?")
    said = list(g.generate(model, ids, pixels[0], 5))
    found = attention_to_patches(model, ids, said, pixels[0], 1)
    assert found.shape == (5, model.patches) and (found >= 0).all() and (found.sum(1) < 1).all()
    real, kept = cached.attention, []

    def spy(q, k, v, *rest, **named):
        """Values that are one in a patch's place and zero elsewhere: the answer is attention."""
        at, G = ids.index(data.IMAGE), v.shape[2]
        marked = torch.zeros(1, k.shape[1], G, model.patches)
        marked[0, at:at + model.patches] = torch.eye(model.patches)[:, None]
        p = (q.transpose(1, 2) * q.shape[-1] ** -.5) @ k.transpose(1, 2).repeat_interleave(
            q.shape[2] // G, 1).transpose(2, 3)
        T = p.shape[-1]
        p = p.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf).softmax(-1)
        kept.append((p @ marked.transpose(1, 2).repeat_interleave(q.shape[2] // G, 1)).mean(1)[0])
        return real(q, k, v, *rest, **named)
    monkeypatch.setattr(cached, "attention", spy)
    with torch.no_grad():
        model(torch.tensor([ids + said[:-1]]), pixels[0])
    most = attention_to_patches(model, ids, said, pixels[0])
    assert any(torch.equal(most, attention_to_patches(model, ids, said, pixels[0], i))
               for i in (0, 1))
    off = lambda other: float((found - other).abs().max() / found.max())
    assert off(kept[1][-5:]) < LIMIT
    assert off(kept[0][-5:]) > LIMIT and off(kept[1][-6:-1]) > LIMIT        # controls


def test_inside_a_box():
    grid = torch.zeros(4, 4)
    grid[1:3, 0:2] = 1
    assert mean_inside_box(grid, (0, .25, .5, .75)) == (1, 0)
    assert mean_inside_box(grid, (.5, .25, 1, .75))[0] == 0         # control: x and y in order
    between_middles = mean_inside_box(grid, (.26, .3, .3, .35))
    assert between_middles == (1, pytest.approx(3 / 15))


def test_attention_picture(folder, inside, tmp_path):
    from PIL import Image
    red, out = folder / "photos/0.png", tmp_path / "out.png"
    code, said, err = inside(args_for(folder, red, "What?", "--attention", out, "--verbose"))
    assert code == 0 and said and "prompt:" in err
    assert Image.open(out).size[1] % 192 == 0
    assert inside(args_for(folder, red, "What?", "--attention", tmp_path / "no/x.png"))[0] == 3
    assert inside(args_for(folder, red, "What?", "--attention", out, "--layer", 9))[0] == 2


# --------------------------------------------------------------------------------- the talk, input

def test_two_pictures_in_a_talk(model, pixels):
    turns = ["What <image>?", "a", "And this?"]
    ids = g.build_prompt(turns, "v1", model.tokenizer, {0, 2})
    assert ids.count(data.IMAGE) == 2 and "What  <image> ?" in model.tokenizer.decode(ids)
    plain = g.build_prompt(["What?", "a", "And this?"], "v1", model.tokenizer, {0, 2})
    talk = [{"from": ("human", "gpt")[i % 2], "value": t}
            for i, t in enumerate(["<image>\nWhat?", "a", "<image>\nAnd this?"])]
    assert plain == data.prompt_tokens(talk, "v1", model.tokenizer)
    with torch.no_grad():
        both = lambda *x: model(torch.tensor([plain]), torch.cat(x))[:, -1]
        assert gap(both(pixels[0], pixels[1]), both(pixels[1], pixels[0])) > LIMIT


def test_chat_keeps_the_first_picture(folder, inside, tmp_path):
    red, blue = folder / "photos/0.png", folder / "photos/2.png"
    code, out, err = inside(args_for(folder, red), "What?", f"/image {blue}", "And this?",
                            f"/save {tmp_path}/x.json", "/reset", "What?")
    said = out.splitlines()
    _, other, _ = inside(args_for(folder, blue), "What?")
    (row,) = json.loads((tmp_path / "x.json").read_text())
    assert code == 0 and len(said) == 3 and row["image"] == ["0.png", "2.png"]
    assert said[2] == other.splitlines()[0]                 # reset keeps the newest


def test_prompts_of_every_kind(model, pixels):
    """Nothing that is typed adds a picture or a turn, or stops the program."""
    for typed in ("😀 é 漢", "שלום עולם", "\u202eabc", "a\r\nb\tc", "</s><s>[INST]", "ASSISTANT:"):
        assert prompt_error(typed) is None
        ids = asked(model, typed)
        assert ids.count(data.IMAGE) == 1 and ids.count(model.tokenizer.eos) == 0
        assert len(list(g.generate(model, ids, pixels[0], 2))) == 2
    long = asked(model, "word " * 200_000)                  # 1 MB
    with pytest.raises(UserError, match="context"):
        next(g.generate(model, long, pixels[0]))


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "captions.json"
    files.write_json(path, ["old"])
    old = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as m:
        m.setattr(files, "fsync_path", full)
        with pytest.raises(UserError, match="captions.json: No space left on device: name"):
            files.write_json(path, ["new"])
    assert path.read_bytes() == old and not list(tmp_path.glob("*.tmp"))
    for bad in ("no/x.json", tmp_path, "/dev/null", tmp_path / ("long" * 99)):
        with pytest.raises(UserError, match="name another"):
            files.write_json(bad, [])
    files.write_json(path, ["new"])                                 # control
    assert json.loads(path.read_text()) == ["new"]


@pytest.mark.parametrize("seconds, lines", [(1, 0), (4, 3)])
def test_progress_is_a_line_every_ten_seconds(monkeypatch, capsys, seconds, lines):
    """Of batches: 8 things each, but the last has 5; on a terminal a bar says the same."""
    clock = iter(range(0, 10 * seconds, seconds))
    monkeypatch.setattr(errors.time, "monotonic", lambda: next(clock))
    assert list(errors.progress(range(9), "pictures", 69, 8)) == list(range(9))
    found = capsys.readouterr().err.splitlines()
    assert len(found) == lines
    if lines:
        assert found[0] == "24 of 69 pictures, 2 a second" and found[-1].startswith("69 of 69 ")
    monkeypatch.undo()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(errors.progress(range(9), "pictures", 69, 8)) == list(range(9))
    assert "69/69" in capsys.readouterr().err


def test_attended_finds_the_box_of_the_thing_named(monkeypatch):
    """A model that looks exactly where it should, and one that looks at the next thing's place."""
    import attended
    toy = Path(__file__).parents[1] / "toy/weights"
    vlm = new_vlm(toy / "clip", toy / "llama")
    scenes, side = [make_scene(i, "test", 3) for i in range(4)], int(vlm.patches ** .5)

    def looking(shift):
        def look(model, ids, tokens, pixels, layer):
            scene = next(s for s in scenes if torch.equal(vlm.pixels(draw(s)), pixels))
            out = torch.full((len(tokens), side, side), .1)
            ends = attended.named(tokens, vlm.tokenizer, [t.full for t in scene.things])
            for i, t in enumerate(scene.things):
                x, y = scene.things[(i + shift) % 3].centre
                out[ends[t.full], int(y * side), int(x * side)] = 5
            return out.flatten(1)
        return look
    found = []
    for shift in (0, 1):
        monkeypatch.setattr(attended, "attention_to_patches", looking(shift))
        found.append(attended.attended(vlm, scenes, 0))
    assert found[0][0] > 2 * found[0][1] and found[0][0] > 2 * found[0][2]
    assert found[1][0] < found[0][0] / 2                            # control
