"""Whose shape is it? Scenes that ask for it, what the parts learn from them, how it is scored."""
import colorsys
import hashlib
import random

import pytest
import torch

import data
from evaluate.binding import (GROUPS, attention_before_shape, attention_to_all, description_errors,
                              groups_of, has_error, main, objects_told)
from evaluate.toy import held_out_scenes, linear_probe, probe_accuracy, train_probes
from clip import ViT
from llama import Config, Llama
from toy.augment import draw_augmented, hue_distance, recolour, unnamed_rgb
from toy.induction import DISTANCES, init_induction_heads
from toy import parts
from toy.parts import EASY_STEPS, FIRST_STEPS, LONE_STEPS, clip_batch, clip_job, clip_pictures
from toy.phrases import is_true_of, phrases
from toy.rows import notes_row, stack_rows, swap_words, word_picture_row
from toy.texts import description, KIND_WEIGHTS, training_sample
from toy.world import (COLOURS, HELD_OUT_PAIRS, SHAPES, SIDE, draw, lone_scene, make_scene,
                       split_of, training_scene)

LLAMA, CLIP = "toy/weights/llama", "toy/weights/clip"


@pytest.fixture(scope="module")
def tokenizer():
    return data.Tokenizer(LLAMA)


# ---------------------------------------------------------------------------- scenes and pictures

def test_training_scenes_share_what_they_say():
    """Most of them, against one in four of the scenes that are simply drawn."""
    def rate(make, group):
        return sum(group in groups_of(make(i)) for i in range(600)) / 600
    assert rate(make_scene, "colour shared") < .32 < .5 < rate(training_scene, "colour shared")
    assert rate(make_scene, "shape shared") < rate(training_scene, "shape shared")
    assert rate(make_scene, "nothing shared") > .47 > .4 > rate(training_scene, "nothing shared")
    for shared in ("colour", "shape"):
        scenes = [make_scene(i, count=3, shared=shared) for i in range(100)]
        assert all(f"{shared} shared" in groups_of(s) for s in scenes)
        assert all(len({t.name for t in s.things}) == 3 for s in scenes)


def test_training_scenes_belong_to_training_and_follow_from_the_seed():
    scenes = [training_scene(f"s{i}") for i in range(600)]
    assert {split_of(s) for s in scenes} == {"train"}
    assert scenes[:50] == [training_scene(f"s{i}") for i in range(50)]
    assert len({s.key for s in scenes}) > 500


def test_lone_objects_stand_where_make_scene_puts_none():
    """Between the cells' middles, small and large; what is said of their place is true."""
    def off_middle(scene):
        t, = scene.things
        return max(abs(3 * v % 1 - .5) for v in t.centre)
    lone = [lone_scene(i) for i in range(400)]
    usual = [s for s in (make_scene(i, count=1) for i in range(400)) if s.things[0].radius < .16]
    assert sum(off_middle(s) > .3 for s in lone) > 150 and not any(
        off_middle(s) > .3 for s in usual)
    for s in lone:
        t, = s.things
        assert t.place == 3 * int(3 * t.centre[1]) + int(3 * t.centre[0])
        assert split_of(s) == "train" and all(0 <= v <= 1 for v in t.box)
    assert {t.size for s in lone for t in s.things} == {"small", "large"}
    assert lone[:20] == [lone_scene(i) for i in range(20)]


def test_scenes_that_share_nothing_on_purpose_are_the_scenes_of_before():
    """The held-out scenes of every table so far: a seed means what it meant."""
    keys = "".join(make_scene(i, split, 1 + i % 4).key for split in ("train", "test", "novel")
                   for i in range(200))
    assert hashlib.sha256(keys.encode()).hexdigest().startswith(SCENES), "scenes changed"


SCENES = "7b33fa9848b0acc9"


def test_training_of_a_vlm_shows_them():
    told = [training_sample(0, 1, i, "descriptions")[1][1]["value"] for i in range(300)]
    colours = [[words[1] for words in objects_told_words(text)] for text in told]
    assert sum(len(set(c)) < len(c) for c in colours) / 300 > .4


def objects_told_words(text):
    return [(size, colour) for _, size, colour, _ in objects_told(text)]


@pytest.mark.parametrize("shape", SHAPES)
def test_colours_without_a_name_are_none_of_the_named_and_never_a_held_out_pair(shape):
    rng, kept_out = random.Random(0), [c for c, s in HELD_OUT_PAIRS if s == shape]
    named = 0
    for _ in range(2000):
        hue, saturation, value = colorsys.rgb_to_hsv(*(v / 255 for v in unnamed_rgb(rng, shape)))
        if saturation > .16:
            assert all(hue_distance(hue, c) > .05 for c in kept_out), (hue, saturation)
        if saturation > .5 and value > .45:
            named += any(hue_distance(hue, c) < .02 for c in COLOURS)
    assert named == 0


def test_without_the_rule_the_held_out_colours_would_come():
    """The control: the other shapes are seen near those colours, pale or dark."""
    rng, near = random.Random(0), 0
    for _ in range(2000):
        hue, saturation, _ = colorsys.rgb_to_hsv(*(v / 255 for v in unnamed_rgb(rng, "circle")))
        near += saturation > .16 and hue_distance(hue, "purple") < .05
    assert near > 20


def test_augmented_pictures_follow_from_the_seed_and_leave_the_objects_where_they_are():
    for i in range(40):
        scene = make_scene(i)
        a, kept = draw_augmented(scene, random.Random(i))
        b, _ = draw_augmented(scene, random.Random(i))
        assert a.tobytes() == b.tobytes() and a.size == (SIDE, SIDE) and a.mode == "RGB"
        assert a.tobytes() != draw(scene).tobytes()
    assert {draw_augmented(make_scene(i), random.Random(i))[1] for i in range(40)} == {True, False}


def test_clip_learns_of_them_only_what_is_true():
    """No colour and no background is named that the picture does not show."""
    scene = recolour(make_scene(5), 5)
    said = [text for _ in range(50) for text, _ in phrases(scene, random.Random(_))]
    assert not any(colour in text.split() for text in said for colour in COLOURS)
    shown = clip_pictures(3 * EASY_STEPS, 32)
    assert any(not s.background for s, _ in shown) and any(not s.things[0].colour for s, _ in shown)
    for s, _ in shown:
        for text, fact in phrases(s, random.Random(0)):
            assert is_true_of(fact, s) and ("background" not in text or s.background)


def test_clip_begins_with_easy_pictures():
    for scene, picture in clip_pictures(EASY_STEPS - 1, 16):
        assert scene.background and scene.things[0].colour
        assert picture.tobytes() == draw(scene).tobytes()


def test_lone_objects_come_in_a_second_schedule(tmp_path):
    """From the first step they slow everything else down: the first schedule has none of them."""
    far = lambda scene: any(abs(3 * v % 1 - .5) > .3 for v in scene.things[0].centre)
    for step, lone in ((FIRST_STEPS - 1, 0), (FIRST_STEPS, 4)):
        first = [scene for scene, _ in clip_pictures(step, 16)[::2]]
        numbers = range(16 * step, 16 * step + 16)
        assert sum(s.things[0].centre == lone_scene(i).things[0].centre
                   for s, i in zip(first, numbers)) == lone
        assert any(map(far, first)) == bool(lone)
    scale = clip_job(tmp_path)["lr_scale"]
    assert scale(60) > .9 and scale(FIRST_STEPS - 1) < 1e-5 and scale(FIRST_STEPS) == .3 / 50
    assert .29 < max(map(scale, range(FIRST_STEPS, FIRST_STEPS + LONE_STEPS))) < .3
    assert scale(FIRST_STEPS + LONE_STEPS - 1) < 1e-5


def test_the_second_schedule_of_llama_asks_for_other_things(tmp_path, monkeypatch):
    """From its first step on, and not before; its rate begins anew, at half."""
    asked = []

    def row(i, tokenizer, weights):
        asked.append(weights)
        return [1, 5, 2], [0., 1., 1.]
    monkeypatch.setattr(parts, "notes_row", row)
    monkeypatch.setattr(parts, "word_picture_row", row)
    job = parts.llama_job(tmp_path)
    for step, weights in ((parts.WORD_STEPS - 4, KIND_WEIGHTS), (parts.WORD_STEPS, parts.SHARPER)):
        asked.clear()
        job["batches"](step)
        assert len(asked) == 4 * job["batch"] and set(asked) == {weights}
    assert len(parts.SHARPER) == len(KIND_WEIGHTS) and parts.SHARPER != KIND_WEIGHTS
    scale = job["lr_scale"]
    assert scale(1000) == 1 and scale(parts.WORD_STEPS - 1) < 1e-3
    assert scale(parts.WORD_STEPS) == .01 and scale(parts.WORD_STEPS + 200) == .5


def test_a_batch_of_clip_says_what_is_true_of_which_picture():
    pixels, texts, is_true, links, first, same = clip_batch(
        3 * EASY_STEPS, 8, lambda texts: list(texts))
    assert pixels.shape == (16, 3, SIDE, SIDE) and is_true.shape == (16, len(texts))
    assert all(is_true[b, k] for b, k in links.tolist())
    assert same.shape == (16, 16) and same.diagonal().all() and len(first) == 16


# ------------------------------------------------------------------------------- the rows of text

def test_swapped_words_are_swapped_everywhere(tokenizer):
    """In the picture and in the answer alike, so that copying is right; other words stay."""
    at, is_ = (tokenizer.encode(f". {w}", bos=False)[-1] for w in ("At", "is"))
    named = {tokenizer.encode(w, bos=False)[0] for w in (*COLOURS, *SHAPES)}
    found = unnamed = 0
    for i in range(120):
        ids, _ = word_picture_row(i, tokenizer)
        patches = [set(x) for x in ids if isinstance(x, tuple)]
        for n in range(len(ids) - 8):
            # At ROW COLUMN is a SIZE COLOUR SHAPE
            if ids[n] == at and ids[n + 3] == is_:
                told = {*ids[n + 1:n + 3], *ids[n + 5:n + 8]}
                assert any(told <= patch for patch in patches), tokenizer.decode(ids[n:n + 8])
                found += 1
                unnamed += bool(set(ids[n + 6:n + 8]) - named)
    assert found > 100 and unnamed > 20


def test_swap_words_by_hand(tokenizer):
    red, star = (tokenizer.encode(w, bos=False)[0] for w in ("red", "star"))
    other = tokenizer.encode("background", bos=False)[0]
    seen = set()
    for seed in range(20):
        (ids, weights) = swap_words(([red, (red, star), other, red], [0., 0., 1., 1.]), tokenizer,
                                    random.Random(seed))
        assert ids[0] == ids[3] == ids[1][0] and ids[2] == other and weights == [0., 0., 1., 1.]
        seen.add(ids[0])
    assert red in seen and len(seen) > 10


def test_rows_are_what_the_model_is_asked_in(tokenizer):
    plain = [notes_row(i, tokenizer) for i in range(40)]
    assert any("USER" in tokenizer.decode(ids) for ids, _ in plain)
    ids, weights = stack_rows(plain)
    assert ids.shape[:2] == weights.shape and ids.shape[2] == 5 and (weights <= 1).all()


def test_the_notes_reach_five_words_back():
    """At its start a head of layer 0 looks one distance back: 4.5 is half of 4 and half of 5."""
    torch.manual_seed(0)
    llm = Llama(Config(320, 128, 5, 4, 4, 352, 1e-5, 1e5, 1024)).eval()
    init_induction_heads(llm)
    ids = torch.randint(259, 320, (24,), generator=torch.Generator().manual_seed(0)).tolist()
    weights = attention_to_all(llm, ids)[0, -1]                 # layer 0, the mean of four heads
    wanted = torch.zeros(24)
    for distance, _, words in DISTANCES:
        for back in ((distance,) if words == 1 else (4, 5)):
            wanted[23 - back] += 1 / 4 / words
    assert (weights - wanted).abs().max() < .01


# -------------------------------------------------------------------------------------- the scores

def test_objects_told_reads_descriptions_back():
    for i in range(300):
        scene = make_scene(i, "test", 1 + i % 4)
        for rng in (None, random.Random(i)):
            assert not has_error(scene, description(scene, rng))
    assert objects_told("At top left is a pale red star. There is one. At top left is") == []


def other_shape(scene):
    """The fault: an object gets the shape of the other object of its colour."""
    text = description(scene)
    for a in scene.things:
        for b in scene.things:
            if a is not b and a.colour == b.colour:
                return text.replace(f"{a.where} is a {a.full}",
                                    f"{a.where} is a {a.size} {a.colour} {b.shape}", 1)
    return text


def test_the_fault_shows_in_its_own_column_and_hides_in_the_mean():
    scenes = held_out_scenes(400)
    right = description_errors(scenes, [description(s) for s in scenes])
    assert list(right.values()) == [0, 0, 0] and len(right) == len(GROUPS)
    fault = description_errors(scenes, [other_shape(s) for s in scenes])
    assert fault["errors, colour shared"] > .9 and fault["errors, nothing shared"] == 0


@pytest.mark.parametrize("spoil", [
    lambda text: text.replace(" small ", " large ", 1).replace(" large ", " small ", 2),
    lambda text: text.replace("top left", "top right"),
    lambda text: text.split(" At ")[0],
    lambda text: text + " At middle centre is a small red star."])
def test_any_difference_is_an_error(spoil):
    spoiled = [i for i in range(100) if (s := make_scene(i, "test", 1 + i % 4))
               and spoil(description(s)) != description(s)]
    assert len(spoiled) > 10
    for i in spoiled:
        scene = make_scene(i, "test", 1 + i % 4)
        if spoil(description(scene)).count("middle centre") < 2:
            assert has_error(scene, spoil(description(scene))), i


def test_attention_is_causal_and_adds_up(tokenizer):
    llm = Llama.from_pretrained(LLAMA)
    weights = attention_to_all(llm, tokenizer.encode("large red star top left; plain background."))
    assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)
    assert (weights.triu(1) == 0).all()


def test_the_shipped_model_reads_the_right_object_and_an_untrained_one_does_not(tokenizer):
    scenes = held_out_scenes(120)
    shipped = Llama.from_pretrained(LLAMA)
    found = attention_before_shape(shipped, tokenizer, scenes)
    right, other = max(found.tolist())
    assert right > .4 and right > 4 * other, found
    torch.manual_seed(0)
    llm = Llama(shipped.config).eval()
    for right, other in attention_before_shape(llm, tokenizer, scenes).tolist():
        assert .5 < right / other < 2


def test_the_command_prints_both(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["binding", LLAMA, "--scenes", "24", "--out",
                                     str(tmp_path / "x.png")])
    main()
    said = capsys.readouterr().out
    assert "errors, colour shared" in said and "layer 4" in said
    assert (tmp_path / "x.png").stat().st_size > 5000


def test_the_probe_of_held_out_pairs_looks_at_those_objects_only():
    vit = ViT.from_pretrained(CLIP)
    probes = train_probes(vit, 300)
    scenes = held_out_scenes(60, "novel")
    assert linear_probe(vit, 75) == probe_accuracy(probes, vit, held_out_scenes(75))
    only = probe_accuracy(probes, vit, scenes, HELD_OUT_PAIRS)
    everything = probe_accuracy(probes, vit, scenes)
    assert set(only) == {"colour", "shape", "size", "place"} and only != everything
