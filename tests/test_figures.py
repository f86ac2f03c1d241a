"""docs/figures.py: the pictures say what the code does, and every text fits its place."""
import random
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from docs import figures
from docs.drawing import knock_out, lens, masks, packed, parts, way
from docs.drawing.scenes import measured_scenes, object_patches
from docs.drawing.svg import MARGIN, Sheet, width_of, wrapped
from formats.errors import BadModel
from kernels.attention import causal, document_spans, seen_matrix

PICTURES = ROOT / "docs/pictures"


@pytest.fixture(scope="module")
def model():
    return way.toy_model()


# ------------------------------------------------------------------------------ the sheet

def test_a_text_that_does_not_fit_is_an_error():
    sheet = Sheet("A title")
    sheet.text(MARGIN, 60, "short")
    for x, anchor in ((400, "start"), (10, "end"), (20, "middle")):
        with pytest.raises(ValueError, match="does not fit"):
            sheet.text(x, 60, "much too long for this place", anchor=anchor)
    with pytest.raises(ValueError, match="does not fit into 20"):
        sheet.text(MARGIN, 60, "longer than that", room=20)


def test_a_paragraph_is_cut_between_words():
    text = "one two three four five six seven"
    lines = wrapped(text, 90)
    assert " ".join(lines) == text and len(lines) > 2
    assert all(width_of(line) <= 90 for line in lines)


@pytest.mark.parametrize("path", sorted(PICTURES.glob("*.svg")), ids=lambda path: path.stem)
def test_each_picture_is_whole_alone_and_has_two_schemes(path):
    text = path.read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    width, height = map(float, root.get("viewBox").split()[2:])
    assert width == 480 and height < 2000
    assert "prefers-color-scheme:dark" in text and len(text) < 300_000
    assert re.findall(r'(?:href|src)="(?!data:)|url\(|@import|<script', text) == []
    for box in root.iter("{http://www.w3.org/2000/svg}text"):
        assert 0 <= float(box.get("x")) <= width and 0 < float(box.get("y")) < height
        assert float(box.get("font-size")) >= 13        # ten pixels on a phone


def test_pictures_of_rules_are_as_the_code_draws_them_now(tmp_path):
    for name, draw in (("masks", masks.draw_masks), ("tiles", masks.draw_tiles)):
        draw(tmp_path / name)
        assert (tmp_path / name).read_text() == (PICTURES / f"{name}.svg").read_text(), (
            f"python docs/figures.py {name}")


# ------------------------------------------------------------------------------ masks and tiles

def faults(rule, n, documents, kinds):
    """Tiles that are called skipped although a query sees a key, or whole although one does not."""
    q = torch.zeros(1, masks.SIZE, 1, 1)
    spans = None if documents is None else document_spans([list(documents)])
    seen = seen_matrix(q, q, rule, n, 0, None, spans).view(masks.SIZE, masks.SIZE)
    wrong, B = 0, masks.BLOCK
    for i, line in enumerate(kinds):
        for j, kind in enumerate(line):
            tile = seen[i * B:(i + 1) * B, j * B:(j + 1) * B]
            wrong += kind == "skipped" and bool(tile.any()) or kind == "whole" and not tile.all()
    return wrong


@pytest.mark.parametrize("name, rule, n, documents, _", masks.SHOWN)
def test_no_tile_is_skipped_that_is_seen(name, rule, n, documents, _):
    assert not faults(rule, n, documents, masks.tile_kinds(rule, n, documents))
    # control: what another rule skips is wrong here
    assert name == "causal" or faults(rule, n, documents, masks.tile_kinds(causal))


def test_under_causal_nothing_is_visited_in_vain():
    kinds = masks.tile_kinds(causal)
    assert [line.count("skipped") for line in kinds] == list(range(11, -1, -1))
    assert masks.share_skipped(kinds) == pytest.approx(66 / 144)


# ------------------------------------------------------------------------------ shapes, parts, rows

def test_shapes_from_sizes_are_those_of_a_run(model):
    measured = way.measured_shapes(model, way.draw(way.make_scene(111, "test", 3), 256))
    worked_out = way.shapes(model.vision.config, model.llm.config, measured["ids"][1])
    assert worked_out == measured
    assert way.shapes(model.vision.config, model.llm.config, 9) != measured     # control


TRAINS = {("llava", 1): {"projector"}, ("llava-1.5", 1): {"projector"},
          ("llava", 2): {"projector", "LLaMA 7B"}, ("llava-1.5", 2): {"projector", "LLaMA 7B"},
          ("blip2", 1): {"Q-Former"}, ("blip2", 2): {"Q-Former", "projector"},
          ("minigpt4", 1): {"projector"}, ("minigpt4", 2): {"projector"},
          ("sharegpt4v", 1): {"vision tower", "projector", "LLaMA 7B"},
          ("sharegpt4v", 2): {"projector", "LLaMA 7B"}}


@pytest.mark.parametrize("recipe, stage", TRAINS)
def test_what_trains_is_what_the_papers_say(recipe, stage):
    found = parts.counts(parts.stage_model(parts.args_of(recipe, stage)))
    assert {name for name, (trained, _) in found.items() if trained} == TRAINS[recipe, stage]
    assert ("Q-Former" in found) == (recipe in ("blip2", "minigpt4"))
    for name, (trained, total) in found.items():        # a part trains whole, but for one
        is_half = (recipe, stage, name) == ("sharegpt4v", 1, "vision tower")
        assert (0 < trained < total) == is_half


def test_the_memory_is_what_the_plan_prints(capsys):
    import train
    from trainer.plan import print_plan
    args = parts.args_of("llava-1.5", 2)
    args.memory = 80
    print_plan(args, train.set_trainable)
    total = float(re.search(r"^  total +([\d.]+)", capsys.readouterr().out, re.M)[1])
    assert sum(parts.forecast()[0].values()) / 1e9 == pytest.approx(total, abs=.005)


def test_packed_and_padded_rows_hold_the_same_samples():
    lengths = packed.sample_lengths()
    rows = packed.data.pack(lengths, packed.ROW)
    assert sorted(i for row in rows for i in row) == list(range(packed.SAMPLES))
    assert len(set(lengths)) > 8 and max(lengths) <= 2048


def test_the_spliced_row_has_the_answer_as_its_labels(model):
    ids, labels = way.data.encode(way.TALK, "v1", model.tokenizer)
    tokens = way.tokens_of(ids, labels, model.tokenizer)
    assert [word for word, has_loss in tokens if has_loss] == ["The", "star", "is", "red", ".",
                                                               "</s>"]
    assert [word for word, _ in tokens].count("IMAGE") == 1


# ------------------------------------------------------------------------------ what is measured

def test_an_object_covers_the_patch_at_its_centre_and_not_its_neighbours():
    for scene in measured_scenes(8):
        covered = [object_patches(scene, thing, 8) for thing in scene.things]
        for thing, patches in zip(scene.things, covered):
            x, y = (int(8 * v) for v in thing.centre)
            assert patches[8 * y + x] and patches.sum() < 40
        for i, patches in enumerate(covered):
            for thing in scene.things[:i] + scene.things[i + 1:]:
                x, y = (int(8 * v) for v in thing.centre)
                assert not patches[8 * y + x]


def test_the_lens_counts_words_that_are_true_of_the_object():
    scenes = measured_scenes(4)
    words = [[""] * 64 for _ in scenes]
    for row, scene in zip(words, scenes):
        for thing in scene.things:
            for p in object_patches(scene, thing, 8).nonzero().flatten().tolist():
                row[p] = thing.shape
    found = lens.shares(words, scenes, 8)
    assert found["shape"] == found["any"] == 1 and found["colour"] == found["place"] == 0
    assert found["control"] < 1
    assert lens.shares([["."] * 64 for _ in scenes], scenes, 8)["any"] == 0         # control
    assert "| none | 0.000 |" in lens.table_of([found])


def test_the_lens_ends_with_what_the_model_would_say(model):
    """After the last block the word is the prediction of the model itself."""
    scenes = measured_scenes(2)
    pixels = lens.pixels_of(model, scenes)
    layers = lens.patch_words(model, pixels)
    assert len(layers) == model.llm.config.depth + 1
    assert all(len(row) == model.patches for layer in layers for row in layer)
    prompt = lens.build_prompt(["Describe this image"], model.template, model.tokenizer)
    start = lens.image_starts(prompt, model.patches)[0]
    with torch.inference_mode():
        logits = model(torch.tensor([prompt] * 2), pixels)[:, start:start + model.patches]
    ids = logits[..., :len(model.tokenizer)].argmax(-1)[1].tolist()
    assert [model.tokenizer.token(i).replace("▁", "") for i in ids] == layers[-1][1]


@pytest.mark.parametrize("kind", knock_out.COLOURS)
def test_only_the_value_of_an_answer_has_a_label(model, kind):
    rng, scene = random.Random(0), measured_scenes(4)[0]
    asked = knock_out.ask(scene, kind, rng)
    thing, _, answer = asked
    value = {"colour": thing.colour, "shape": thing.shape, "size": thing.size,
             "place": thing.where}[kind]
    assert answer.endswith(f"{value}.")
    _, labels = knock_out.row_of(asked, model.tokenizer, kind)
    kept = [label for label in labels if label != knock_out.data.IGNORE]
    assert model.tokenizer.decode(kept).strip() == value


def test_what_is_taken_out_becomes_the_mean_of_the_empty_patches():
    x = torch.randn(2, 9, 3, generator=torch.Generator().manual_seed(0))
    chosen, empty = torch.zeros(2, 4, dtype=torch.bool), torch.zeros(2, 4, dtype=torch.bool)
    chosen[0, 1], chosen[1, :2], empty[:, 2:] = True, True, True
    out = knock_out.without(x, 3, chosen, empty)
    for row in range(2):
        mean = x[row, 5:7].mean(0)
        for p in range(4):
            wanted = mean if chosen[row, p] else x[row, 3 + p]
            assert torch.allclose(out[row, 3 + p], wanted)
    assert torch.equal(out[:, :3], x[:, :3]) and torch.equal(out[:, 7:], x[:, 7:])
    control = knock_out.as_many(chosen, empty, random.Random(0))
    assert control.sum(1).tolist() == [1, 2] and not (control & ~empty).any()


def test_nothing_taken_out_is_the_same_for_object_and_control(model):
    found = knock_out.measure(model, measured_scenes(4), "size")
    assert len(found["object"]) == model.llm.config.depth + 1
    assert found["object"][-1] == found["control"][-1]
    table = knock_out.table_of({"size": found})
    assert "| before block 1 |" in table and "| nothing |" in table


def test_a_place_is_right_only_with_both_words():
    class Said:
        """Hidden states are logits."""
        class llm:
            head, norm = staticmethod(lambda x: x), staticmethod(lambda x: x)
    said = torch.nn.functional.one_hot(torch.tensor([[1, 2, 3], [1, 2, 0]]), 4).float()
    labels = torch.tensor([[-100, 1, 2], [-100, 1, 1]])
    assert knock_out.hit_rate(Said, said, labels) == .5


# ------------------------------------------------------------------------------ the command

def test_the_command_draws_what_is_named(tmp_path, capsys):
    figures.main(figures.parse(["masks", "--out", str(tmp_path / "new")]))
    assert (tmp_path / "new/masks.svg").exists() and "masks.svg written" in capsys.readouterr().out
    assert figures.parse([]).names == figures.FREE
    assert len(figures.parse(["--all"]).names) == 10


def test_what_cannot_be_drawn_is_refused(tmp_path):
    with pytest.raises(SystemExit) as end:
        figures.parse(["mask"])
    assert end.value.code == 2
    for name in figures.TRAINED:
        with pytest.raises(BadModel, match="train it first"):
            figures.main(figures.parse([name, "--run", str(tmp_path), "--out", str(tmp_path)]))
