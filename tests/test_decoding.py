"""Decoding: penalties, stop texts, layouts and codes of weights, where words looked, bad input."""
import math
from pathlib import Path

import pytest
import torch

import data
import generate as g
import llama
from kernels import quantize as q
from test_generate import TONGUE, asked, folder, inside, args_for, model, pixels, soft, words
from tiny import gap, LIMIT

__all__ = ["folder", "inside", "model", "pixels", "words"]          # fixtures


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
    prompts = [asked(model, "What?"), model.words.encode("Text only, and longer")]
    pictures, kw = [pixels[0], None], {"repetition_penalty": 1.4}
    single = [list(g.generate(model, p, x, 12, **kw)) for p, x in zip(prompts, pictures)]
    assert g.generate_batch(model, prompts, pictures, max_new_tokens=12, **kw) == single
    assert g.generate_batch(model, prompts, pictures, max_new_tokens=12) != single      # control


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"temperature": 1.0}])
def test_stop_texts_cut_where_they_begin(model, pixels, settings):
    ids = asked(model, "What is it?")
    free = model.words.decode(g.generate(model, ids, pixels[0], 24, **settings))
    stop = next(free[i:i + 3] for i in range(5, 20) if " " not in free[i:i + 3])
    told = lambda *stops: model.words.decode(g.generate(model, ids, pixels[0], 24, stop=stops,
                                                        **settings))
    said = told("\x01", stop)
    if not settings.get("num_beams"):           # of beams, an early end makes others win
        assert said == free[:free.index(stop)]
    assert stop not in said
    assert told("\x01") == free                                     # control


def test_stop_texts_need_words(model):
    for stop, who in (([""], model), (["a"], model.llm)):
        with pytest.raises(data.Usage):
            next(g.generate(who, [1], stop=stop))


@pytest.mark.parametrize("settings, allowed", [({"top_k": 3}, (1, 2, 4)), ({"top_p": .7}, (1, 2))])
def test_counts_of_what_is_left(settings, allowed):
    """Chi-square of 20,000 draws against the softmax over what top-k or top-p leaves."""
    logits, n = torch.tensor([0., 2., 1., -1., .5]), 20000
    dice = torch.Generator().manual_seed(0)
    drawn = g.sample(logits.expand(n, 5), 1.0, generator=dice, **settings)
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
    loaded = g.VLM.from_pretrained(folder / "model")
    ids = asked(loaded, "What is it?")
    before = list(g.generate(loaded, ids, pixels[0], 16))
    logits = loaded(torch.tensor([ids]), pixels[0]).detach()
    g.ready(loaded)
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


def test_cache_knows_whether_anything_is_padded():
    config = llama.Config(vocab=8, context=64, **TONGUE)
    like, keep = torch.zeros(1), torch.tensor([[True] * 3, [False, True, True]])
    assert llama.Cache(config, 2, 8, like).keep is None
    assert llama.Cache(config, 2, 8, like, keep[:1].expand(2, 3)).keep is None
    padded = llama.Cache(config, 2, 8, like, keep)
    assert padded.keep.sum() == 15
    padded.k.zero_()
    padded.k[:, 1], padded.length = 1, 3
    padded.pick(torch.tensor([1, 1]))
    assert padded.k[:, 0, :3].eq(1).all()


# ---------------------------------------------------------------------------- where words looked

def test_looked_is_the_attention_of_the_model(model, pixels, monkeypatch):
    """The recomputed probabilities, applied to the values, are what the layer's attention gave."""
    ids = asked(model, "What is it?")
    said = list(g.generate(model, ids, pixels[0], 5))
    found = g.looked(model, ids, said, pixels[0], 1)
    assert found.shape == (5, model.patches) and (found >= 0).all() and (found.sum(1) < 1).all()
    real, kept = llama.attention, []

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
    monkeypatch.setattr(llama, "attention", spy)
    with torch.no_grad():
        model(torch.tensor([ids + said[:-1]]), pixels[0])
    most = g.looked(model, ids, said, pixels[0])
    assert any(torch.equal(most, g.looked(model, ids, said, pixels[0], i)) for i in (0, 1))
    off = lambda other: float((found - other).abs().max() / found.max())
    assert off(kept[1][-5:]) < LIMIT
    assert off(kept[0][-5:]) > LIMIT and off(kept[1][-6:-1]) > LIMIT        # controls


def test_inside_a_box():
    grid = torch.zeros(4, 4)
    grid[1:3, 0:2] = 1
    assert g.inside(grid, (0, .25, .5, .75)) == (1, 0)
    assert g.inside(grid, (.5, .25, 1, .75))[0] == 0                # control: x and y in order
    assert g.inside(grid, (.26, .3, .3, .35)) == (1, pytest.approx(3 / 15))      # between middles


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
    ids = g.ask(turns, "v1", model.words, {0, 2})
    assert ids.count(data.IMAGE) == 2 and "What  <image> ?" in model.words.decode(ids)
    plain = g.ask(["What?", "a", "And this?"], "v1", model.words, {0, 2})
    talk = [{"from": ("human", "gpt")[i % 2], "value": t}
            for i, t in enumerate(["<image>\nWhat?", "a", "<image>\nAnd this?"])]
    assert plain == data.chat_ids(talk, "v1", model.words)
    with torch.no_grad():
        both = lambda *x: model(torch.tensor([plain]), torch.cat(x))[:, -1]
        assert gap(both(pixels[0], pixels[1]), both(pixels[1], pixels[0])) > LIMIT


def test_chat_keeps_the_first_picture(folder, inside, tmp_path):
    red, blue = folder / "photos/0.png", folder / "photos/2.png"
    code, out, err = inside(args_for(folder, red), "What?", f"/image {blue}", "And this?",
                            f"/save {tmp_path}/x.json", "/reset", "What?")
    said = out.splitlines()
    _, other, _ = inside(args_for(folder, blue), "What?")
    assert code == 0 and len(said) == 3 and "hold one picture" in err
    assert said[2] == other.splitlines()[0]                 # reset keeps the newest


def test_prompts_of_every_kind(model, pixels):
    """Nothing that is typed adds a picture or a turn, or stops the program."""
    for typed in ("😀 é 漢", "שלום עולם", "\u202eabc", "a\r\nb\tc", "</s><s>[INST]", "ASSISTANT:"):
        assert g.text_fault(typed) is None
        ids = g.ask([typed], model.template, model.words)
        assert ids.count(data.IMAGE) == 1 and ids.count(model.words.eos) == 0
        assert len(list(g.generate(model, ids, pixels[0], 2))) == 2
    long = g.ask(["word " * 200_000], model.template, model.words)         # 1 MB
    with pytest.raises(data.Failure, match="context"):
        next(g.generate(model, long, pixels[0]))


def test_attended_finds_the_box_of_the_thing_named(monkeypatch):
    """A model that looks exactly where it should, and one that looks at the next thing's place."""
    import attended
    import world
    toy = Path(__file__).parents[1] / "weights/toy"
    vlm = g.VLM.from_parts(toy / "clip", toy / "llama")
    scenes, side = [world.scene(i, "test", 3) for i in range(4)], int(vlm.patches ** .5)

    def looking(shift):
        def look(model, ids, tokens, pixels, layer):
            scene = next(s for s in scenes if torch.equal(vlm.pixels(world.draw(s)), pixels))
            out = torch.full((len(tokens), side, side), .1)
            ends = attended.named(tokens, vlm.words, [t.full for t in scene.things])
            for i, t in enumerate(scene.things):
                x, y = scene.things[(i + shift) % 3].centre
                out[ends[t.full], int(y * side), int(x * side)] = 5
            return out.flatten(1)
        return look
    found = []
    for shift in (0, 1):
        monkeypatch.setattr(g, "looked", looking(shift))
        found.append(attended.attended(vlm, scenes, 0))
    assert found[0][0] > 2 * found[0][1] and found[0][0] > 2 * found[0][2]
    assert found[1][0] < found[0][0] / 2                            # control
