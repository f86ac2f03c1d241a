"""The shipped Q-Former: its stage 0, its folder without a vision tower, and its gates."""

import json
import random
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import qformer
import train
from clip import CLIP, ViT
from data import BadModel, IGNORE, IMAGE
from evaluate.qformer_parts import (list_accuracy, NOTHING, place_scores, read_out_accuracy,
                                    train_read_out, truth_of, wrong_in_lists)
from evaluate.query_maps import cross_attention, most_different
from evaluate.retrieval import MAX_TEXT_TOKENS, pairwise_accuracy, recall_at_k
from evaluate.toy import held_out_scenes, scene_pixels
from formats import folders
from formats.checkpoints import load_weights
from qformer import Blip2Stage1
from toy.texts import description
from toy.twins import caption_of, pair_of
from toy.world import make_object, make_scene, training_scene
from trainer import qformer_job
from trainer.build import load_qformer_parts, new_toy_stage1

TOY = Path(__file__).parents[1] / "toy/weights"


@pytest.fixture(scope="module")
def model():
    return new_toy_stage1(TOY / "clip", seed=3)


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """A folder with its own vision tower."""
    folder = tmp_path_factory.mktemp("whole")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def without(whole, tmp_path):
    """The same folder without it."""
    shutil.copytree(whole, tmp_path / "without")
    folders.leave_out_tower(tmp_path / "without", "toy/weights/clip")
    return tmp_path / "without"


# ------------------------------------------------------------------------- a folder without a tower

def test_a_folder_without_its_tower_is_the_same_model(model, whole, without):
    sizes = [(f / "model.safetensors").stat().st_size for f in (whole, without)]
    assert sizes[1] < .6 * sizes[0]
    assert not any(name.startswith("vision_model.encoder") for name in load_weights(without))
    again = Blip2Stage1.from_pretrained(without)
    for (name, p), (other, q) in zip(model.named_parameters(), again.named_parameters()):
        assert name == other and torch.equal(p, q) and p.requires_grad == q.requires_grad
    tower, norm, queries = load_qformer_parts(without, None, None)
    assert torch.equal(tower.blocks[3].down.weight, model.vision.blocks[3].down.weight)
    assert torch.equal(norm.weight, model.ln_vision.weight) and queries.config.vocab == 0


def test_another_tower_can_be_given(whole, without, tmp_path):
    torch.manual_seed(1)
    other = CLIP.from_pretrained(TOY / "clip")
    nn.init.normal_(other.vision.blocks[0].down.weight)
    other.save_pretrained(tmp_path / "other")
    for folder in (whole, without):
        found = Blip2Stage1.from_pretrained(folder, vision=tmp_path / "other").vision
        assert torch.equal(found.blocks[0].down.weight, other.vision.blocks[0].down.weight)


def edit(folder, value):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vision_tower": value}))


@pytest.mark.parametrize("entry, why", [
    ({"folder": "toy/weights/clip", "sha256": "0" * 64}, "another vision tower.*--part qformer"),
    ({"folder": "toy/weights/none", "sha256": "0" * 64}, "there is none"),
    ({"folder": "../elsewhere", "sha256": "0" * 64}, "outside"),
    ({"folder": "/", "sha256": "0" * 64}, "outside"),
    ({"folder": 3, "sha256": "0" * 64}, "must give"), ({}, "must give"), ("clip", "must give"),
    ({"folder": "toy/weights/clip"}, "must give")])
def test_a_tower_that_is_not_the_right_one_is_refused(without, entry, why):
    edit(without, entry)
    for load in (Blip2Stage1.from_pretrained, lambda f: load_qformer_parts(f, None, None)):
        with pytest.raises(BadModel, match=why) as info:
            load(without)
        assert "\n" not in str(info.value) and str(without) in str(info.value)
    edit(without, None)                 # no entry: the folder should have a tower, and has none
    with pytest.raises(BadModel, match="vision_model.*missing"):
        Blip2Stage1.from_pretrained(without)


def test_a_tower_of_its_own_is_not_left_out(model, tmp_path):
    """Trained further, it is not that of toy/weights/clip: the folder keeps it, byte for byte."""
    own = new_toy_stage1(TOY / "clip")
    with torch.no_grad():
        own.vision.blocks[2].up.weight[0, 0] += 1e-3
    own.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(BadModel, match="layers.2.mlp.fc1.weight.*keep"):
        folders.leave_out_tower(tmp_path, "toy/weights/clip")
    assert (tmp_path / "model.safetensors").read_bytes() == before


# ---------------------------------------------------------------------------------------- the job

@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(qformer_job, "PAIRS", 4)


@pytest.fixture
def job(few):
    return qformer_job.qformer_job(None)


def test_a_batch_is_pairs_and_what_is_true_of_them(job):
    micro, = job["batches"](7)
    assert micro["pixels"].shape == (8, 3, 64, 64) and micro["is_true"].shape == (8, 8)
    assert micro["is_true"].diagonal().all()
    tokenizer = job["model"].model.tokenizer
    (ids, mask), (long_ids, long_mask) = micro["caption"], micro["told"]
    assert ids.shape == mask.shape and long_ids.shape == long_mask.shape
    for row, kept, told in zip(ids, mask, long_ids):
        assert set(row[~kept].tolist()) <= {tokenizer.pad} and row[kept][-1] == tokenizer.sep
        # descriptions and captions in turn
        assert tokenizer.decode(told).startswith("this picture")
    even, = job["batches"](8)
    assert torch.equal(even["told"][0], even["caption"][0])
    chosen, rows, labels = micro["described"]
    assert [int(i) // 2 for i in chosen] == [0, 1]              # one of each pair of the first half
    assert all((row == IMAGE).sum() == 1 for row in rows) and (labels != IGNORE).any(1).all()
    again, = job["batches"](7)
    assert torch.equal(again["pixels"], micro["pixels"])
    assert not torch.equal(job["batches"](8)[0]["pixels"], micro["pixels"])


def test_what_the_captions_say_when():
    def kinds(first, last):
        return Counter(qformer_job.kind_of(step) for step in range(first, last))
    assert kinds(0, 400)["one"] >= 300
    assert kinds(400, 1400)["one"] < 100 and kinds(400, 1400)["where"] > 500


def test_which_object_of_a_text_is_not_in_a_picture(job):
    """Each quarter of the queries has one object's label; of a text about one object, all have it;
    where none is named, there is none."""
    first, second, third = (make_object(random.Random(i), shape, colour, "small", place)
                            for i, (shape, colour, place)
                            in enumerate((("star", "red", 0), ("circle", "blue", 4),
                                          ("cross", "green", 8))))
    scene = replace(make_scene(0), things=(first, second))
    other = replace(scene, things=(first, third))
    where = ("where", tuple((t.name, t.place) for t in scene.things))
    assert qformer_job.wrong_objects(where, scene) == [0, 0, -1, -1]
    assert qformer_job.wrong_objects(where, other) == [0, 1, -1, -1]
    one = "one", ((second.name, second.place),)
    assert qformer_job.wrong_objects(one, other) == [1] * 4
    some = "some", (("large", first.name), ("", second.name))
    assert qformer_job.wrong_objects(some, scene) == [1, 0, -1, -1]
    assert qformer_job.wrong_objects(("count", (2, "plain")), scene) == [-1] * 4
    for step in range(400, 404):
        micro, = job["batches"](step)
        named = micro["wrong"] >= 0
        assert not (micro["wrong"] > 0)[torch.eye(8, dtype=torch.bool)].any()
        if named.any():             # a text whose objects are all there may still say too little
            assert not ((micro["wrong"] > 0).any(2) & micro["is_true"]).any()


def test_object_loss_asks_each_quarter_for_its_own_object(job):
    """A head that says "wrong" by one quarter of the queries is right where that object is."""
    lessons, (micro,) = job["model"], job["batches"](0)
    width, q = lessons.object_head.in_features, lessons.model.qformer.config.num_queries
    (ids, mask), drawn = micro["caption"], torch.stack((torch.arange(8).flip(0),) * 2)
    features = torch.zeros(8, 65, width)
    lessons.object_head.requires_grad_(False).weight.zero_()[0, 0] = 1
    lessons.object_head.bias.zero_()
    said = torch.zeros(24, q + ids.shape[1], width)
    said[:, q // 4:q // 2, 0] = 9                           # the second quarter says: wrong

    def loss(at):
        wrong = torch.zeros(8, 8, 4)
        wrong[..., at] = 1
        lessons.model.qformer.forward = lambda *_: said
        try:
            return float(lessons.matching_losses(features, ids, mask, drawn, wrong)["object"])
        finally:
            del lessons.model.qformer.forward
    assert loss(1) < .53 < 2.7 < loss(0)        # of those who say nothing it is .69


def test_what_learns_and_from_what(job):
    """Tower and LLaMA stay; the describing loss reaches the queries, and needs the picture."""
    lessons = job["model"]
    micro, = job["batches"](0)
    losses = lessons(micro)
    assert set(losses) == {"itc", "itm", "itg", "lm", "object"}
    assert all(torch.isfinite(value) for value in losses.values())
    losses["lm"].backward(retain_graph=True)
    assert lessons.model.qformer.query_tokens.grad.abs().sum() > 0
    # nothing that reads text takes part in it
    assert lessons.model.qformer.token.weight.grad is None
    sum(losses[name] for name in ("itc", "itm", "itg", "object")).backward()
    for name, p in lessons.named_parameters():
        frozen = name.startswith(("llm.", "model.vision."))
        assert p.requires_grad != frozen and (p.grad is None) == frozen, name
    held = {id(p) for o in job["optimizers"] for g in o.param_groups for p in g["params"]}
    assert held == {id(p) for p in lessons.parameters() if p.requires_grad}


def test_a_text_that_is_true_of_the_other_picture_is_no_negative(job, monkeypatch):
    """Drawn negatives are false, whatever the scores say; the control draws freely."""
    lessons, (micro,), drawn = job["model"], job["batches"](0), []
    real = qformer_job.hard_negatives
    monkeypatch.setattr(qformer_job, "hard_negatives",
                        lambda *args: drawn.append(real(*args)) or drawn[-1])
    truth = torch.eye(8, dtype=torch.bool)
    truth[0, 1:7] = truth[1:7, 0] = True        # picture 0: only text 7 is false, and text 0 of 7
    for seed in range(8):
        lessons({**micro, "is_true": truth, "seed": seed})
    assert all(images[0] == texts[0] == 7 for images, texts in drawn)
    drawn.clear()
    for seed in range(8):
        lessons({**micro, "is_true": torch.eye(8, dtype=torch.bool), "seed": seed})
    assert len({int(texts[0]) for _, texts in drawn}) > 1


def test_stage_0_trains_it_and_resumes_to_the_same_bits(few, tmp_path, monkeypatch):
    monkeypatch.setattr(qformer_job, "STEPS", 3)
    threads = torch.get_num_threads()

    def run(out, *more):
        return train.main(train.parse_args([
            "--stage", "0", "--part", "qformer", "--output-dir", str(out), "--save-every", "1",
            "--threads", "1", *more]))
    try:
        assert run(tmp_path / "a") == 0
        out = tmp_path / "a/qformer"
        lines = [json.loads(line) for line in (out / "metrics.jsonl").open()]
        assert [line["step"] for line in lines] == [1, 2, 3] and {"itc", "lm"} <= set(lines[0])
        first = load_weights(out / "model")
        assert not any(name.startswith("vision_model.encoder") for name in first)
        assert Blip2Stage1.from_pretrained(out / "model").temp != .07
        # the last step is undone and done again
        shutil.rmtree(out / "model")
        shutil.rmtree(out / "step-000003")
        assert run(tmp_path / "a", "--resume", "auto") == 0
        again = load_weights(out / "model")
        assert all(torch.equal(first[name], again[name]) for name in first)
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)


# -------------------------------------------------------------------------------------- the gates

SCENES = [make_scene(f"gates-{i}") for i in range(300)]


def perfect_outputs(scenes):
    """(n, 16, 32): query p holds what stands at place p, and its own number."""
    truth, outputs = truth_of(scenes), torch.zeros(len(scenes), 16, 32)
    for p in range(9):
        outputs[:, p, :7] = nn.functional.one_hot(truth[:, p, 0], 7).float()
        outputs[:, p, 7:13] = nn.functional.one_hot(truth[:, p, 1], 6).float()
        outputs[:, p, 13 + p] = 1
    return outputs


def test_a_read_out_finds_what_the_queries_hold_and_nothing_else():
    outputs, truth = perfect_outputs(SCENES), truth_of(SCENES)
    read_out = train_read_out(outputs[:200], truth[:200], steps=300)
    right = read_out_accuracy(read_out, outputs[200:], truth[200:])
    assert min(right.values()) > .98, right
    # the control: other scenes' outputs
    wrong = read_out_accuracy(read_out, outputs[200:].roll(51, 0), truth[200:])
    assert max(wrong.values()) < .5, wrong
    # queries that do not say which place they are of: the objects are there, their places are not
    blurred = outputs.clone()
    blurred[..., 13:] = 0
    blind = train_read_out(blurred[:200], truth[:200], steps=300)
    assert read_out_accuracy(blind, blurred[200:], truth[200:])["place"] < .6


def test_the_shipped_qformer_passes_its_gates(model):
    """100 scenes, 250 objects: the gates, less three standard errors. Captions with one wrong
    attribute are below their gate (docs/results.md): what is reached, less as much. Untrained:
    chance."""
    scenes = held_out_scenes(100)
    shipped = Blip2Stage1.from_pretrained(TOY / "qformer")
    places = place_scores(shipped, scenes)
    near, recall = pairwise_accuracy(shipped, scenes), recall_at_k(shipped, scenes, itm=False)
    blind = pairwise_accuracy(model, scenes)
    assert min(places["colour"], places["shape"]) >= .91 and places["place"] >= .84, places
    assert max(v for name, v in places.items() if "other" in name) < .5, places
    assert min(recall["image to text 1"], recall["text to image 1"]) >= .88, recall
    assert near["attribute"]["itm"] >= .79 and near["left or right"]["itm"] >= .95, near
    lists, untrained = list_accuracy(shipped, scenes), list_accuracy(model, scenes)
    assert list(lists) == ["first", "second", "third", "fourth"]
    assert min(lists["first"], lists["second"]) >= .95, lists
    assert all(abs(rate - .5) < .3 for rate in untrained.values()), untrained
    for kind, rates in near.items():
        assert abs(rates["itm, other picture"] - .5) < .2 and abs(blind[kind]["itm"] - .5) < .2


def test_one_object_of_a_list_is_wrong():
    scenes = [make_scene(f"lists-{i}") for i in range(60)]
    pairs = wrong_in_lists(scenes)
    for at, rows in pairs.items():
        assert len(rows) >= (10 if at == 3 else 20)
        for i, true, false in rows:
            true, false = (text.replace(" and ", ", ").split(", ") for text in (true, false))
            assert [k for k in range(len(true)) if true[k] != false[k]] == [at]
            assert len(scenes[i].things) >= 3
            assert true[at].split(" in the ")[1] == false[at].split(" in the ")[1]


def test_place_counts_false_alarms():
    truth = torch.zeros(1, 9, 2, dtype=torch.long)
    truth[0, 0] = truth[0, 1] = 1

    class Says:
        def __init__(self, *places):
            self.at = places

        def __call__(self, outputs):
            colour = torch.zeros(1, 9, 7)
            colour[0, :, NOTHING] = .5
            colour[0, list(self.at), 1] = 1
            return colour, colour[..., :6]
    assert read_out_accuracy(Says(0, 1), None, truth)["place"] == 1
    assert read_out_accuracy(Says(0), None, truth)["place"] == .5
    assert read_out_accuracy(Says(0, 1, 2, 3), None, truth)["place"] == .5
    assert read_out_accuracy(Says(0), None, truth)["colour"] == .5


def test_truth_of_a_scene():
    scene = make_scene(111, "test", 3)          # tests/scene.png
    found = {p: tuple(row.tolist()) for p, row in enumerate(truth_of([scene])[0]) if row.any()}
    assert found == {0: (5, 1), 3: (1, 4), 6: (1, 5)}   # blue circle, red star, red cross


def test_attention_of_the_queries(model):
    """Rows are what the module itself computes with: its output is rebuilt from them."""
    pixels = scene_pixels(held_out_scenes(1), 64, "squash")
    maps = cross_attention(model, pixels)
    assert maps.shape == (16, 64) and (maps >= 0).all() and (maps.sum(1) < 1).all()
    cross, seen = model.qformer.blocks[2].cross, []
    handle = cross.register_forward_hook(lambda part, inputs, out: seen.append((inputs, out[0])))
    with torch.no_grad():
        model.qformer(model.ln_vision(model.encode_vision(pixels)), allow=qformer.itc)
        handle.remove()
        (x, features), out = seen[0]
        v = cross.kv(features).view(1, 65, 2, cross.heads, -1)[0, :, 1]         # (1+P, H, D)
        q = cross.q(x).view(16, cross.heads, -1)
        k = cross.kv(features).view(65, 2, cross.heads, -1)[:, 0]
        weights = (torch.einsum("qhd,phd->hqp", q, k) * q.shape[-1] ** -.5).softmax(-1)
        y = torch.einsum("hqp,phd->qhd", weights, v).flatten(1)
        assert torch.allclose(cross.norm(x[0] + cross.out(y)), out[0], atol=1e-5)
    assert torch.allclose(maps, weights.mean(0)[:, 1:], atol=1e-6)
    assert len(set(most_different(maps, 5))) == 5
    assert most_different(maps, 99) == list(range(16))


def test_no_caption_is_cut_off(model):
    """In training, and, of captions, in retrieval, which keeps 35 tokens."""
    longest = [0, 0]
    for i in range(300):
        for scene, fact in pair_of(training_scene(f"lengths:{i}"), i):
            for k, text in enumerate((caption_of(fact), description(scene))):
                longest[k] = max(longest[k], model.tokenizer.encode(text, 999)[0].shape[1])
    assert 30 < longest[0] <= MAX_TEXT_TOKENS < longest[1] <= qformer_job.MOST_TOKENS
