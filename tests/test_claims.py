"""evaluate's retrieval and claims: the measures themselves, on answers known exactly."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import train
from evaluate import claims, toy
from evaluate.__main__ import main
from evaluate.claims import (is_better, is_degenerate, llava, llava_scores, run_script,
                             share_captioner, sharegpt4v)
from evaluate.figure import draw
from evaluate.flags import parse
from evaluate.retrieval import hard_negative_pairs, pairwise_accuracy, recall_at_k
from evaluate.toy import answers, eval_toy, held_out_scenes, scene_pixels
from formats.errors import UsageError
from projector import VLM
from toy.texts import DESCRIBE, KINDS, article, description, training_sample
from toy.world import HELD_OUT_PAIRS, SIDE, make_scene

SCENES = [make_scene(i, "test", 1 + i % 4) for i in range(60)]


class Oracle:
    """A Retriever that knows the truth, spoiled at will: features are scene numbers."""

    def __init__(self, right=True, match=1.):
        self.right, self.scale, self.image_size = right, match, SIDE
        self.texts, self.ln_vision = [], lambda x: x
        self.tokenizer = SimpleNamespace(encode=self.encode)

    def encode(self, texts, length):
        assert length == 35                         # the official one in retrieval
        self.texts = list(texts)
        return torch.arange(len(texts))[:, None], torch.ones(len(texts), 1, dtype=torch.bool)

    def encode_vision(self, pixels):
        """Numbers of the pictures, found again by their pixels."""
        known = scene_pixels(SCENES, SIDE, "squash")
        return torch.stack([(known == p).flatten(1).all(1).float().argmax() for p in pixels])

    def truth(self, number, text):
        scene = SCENES[int(number)]
        fits = all(f"{article(t.name)} in the {t.where}" in text for t in scene.things)
        pair = text.split(" left of ")
        if len(pair) == 2:
            columns = {article(t.name): t.column for t in scene.things}
            fits = columns.get(pair[0], 9) < columns.get(pair[1], -9)
        else:
            fits = fits and text.count(" in the ") == len(scene.things)
        return fits == self.right

    def itm_logits(self, features, ids, mask):
        yes = torch.tensor([float(self.truth(f, self.texts[int(i)]))
                            for f, i in zip(features, ids[:, 0])])
        return torch.stack((-yes, yes), 1) * self.scale

    def encode_image(self, features):
        """One query: a one-hot of the scene's number, in the order of the texts."""
        return torch.eye(len(SCENES))[features.long()][:, None]

    def encode_text(self, ids, mask):
        return torch.ones(len(ids), len(SCENES)) / len(SCENES)


def test_the_reranked_order_is_the_match_logits(monkeypatch):
    """ITC knows nothing here, all cosines are alike: with k of all scenes ITM finds every text."""
    found = recall_at_k(Oracle(), SCENES, k=len(SCENES))
    assert found["image to text 1"] == found["text to image 1"] == 1
    wrong = recall_at_k(Oracle(right=False), SCENES, k=len(SCENES))
    assert wrong["image to text 1"] < .1                                    # the control
    blind = recall_at_k(Oracle(), SCENES, k=len(SCENES), itm=False)
    assert blind["image to text 1"] < .1 and blind["image to text 5"] < .2


def test_near_misses_are_near_and_false():
    made = hard_negative_pairs(SCENES)
    assert set(made) == {"attribute", "left or right"}
    assert len(made["attribute"]) == len(SCENES) and len(made["left or right"]) > 10
    oracle = Oracle()
    for rows in made.values():
        for i, true, false in rows:
            assert oracle.truth(i, true) and not oracle.truth(i, false)
            assert not any(f"{c} {s}" in false for c, s in HELD_OUT_PAIRS)
    for _, true, false in made["attribute"]:        # one colour, shape or place apart
        a, b = (text.replace(",", "").split() for text in (true, false))
        a, b = ([w for w in x if w not in ("a", "an")] for x in (a, b))
        assert len(a) == len(b) and 1 <= sum(x != y for x, y in zip(a, b)) <= 2


def test_pairwise_accuracy_sees_who_knows():
    assert {k: v["itm"] for k, v in pairwise_accuracy(Oracle(), SCENES).items()} == {
        "attribute": 1, "left or right": 1}
    assert {k: v["itm"] for k, v in pairwise_accuracy(Oracle(right=False), SCENES).items()} == {
        "attribute": 0, "left or right": 0}
    assert all(v["itm, other picture"] < .9 for v in pairwise_accuracy(Oracle(), SCENES).values())


@pytest.mark.parametrize("text, ended, repeats, breaks", [
    ("At top left is a red star. There is one object in all.", True, False, False),
    ("A red star. A red star.", True, True, False),
    ("A red star and a red star.", True, True, False),
    ("At top left is a red star. There is one", True, False, True),
    ("At top left is a red star.", False, False, True), ("", True, False, True)])
def test_what_counts_as_repeating_and_breaking_off(text, ended, repeats, breaks):
    assert is_degenerate(text, ended) == (repeats, breaks)


def test_a_claim_holds_only_if_all_of_its_figures_say_so():
    arms = {"a": {"x": .9, "y": .4}, "b": {"x": .8, "y": .5}}
    assert is_better(arms, "a", "b", "x")["holds"]
    assert not is_better(arms, "b", "a", "x")["holds"]
    assert not is_better(arms, "a", "b", "x", "y")["holds"]


def test_the_table_says_in_how_many_seeds_a_claim_holds(monkeypatch, capsys, tmp_path):
    def made(args, seed, scenes):
        return {"it helps": is_better({"with": {"recall": .5 + .1 * seed},
                                            "without": {"recall": .55}}, "with", "without",
                                           "recall")}
    monkeypatch.setattr(claims, "blip2", made)
    args = parse(["claims", "--only", "blip2", "--scenes", "20", "--out",
                               str(tmp_path / "claims.json")])
    main(args)
    out = capsys.readouterr().out
    assert "does not hold here: in 2 of 3 seeds" in out and "0.600 ±0.100" in out
    assert json.loads((tmp_path / "claims.json").read_text())["seeds"] == 3


def talks(style, n=80):
    return [training_sample(0, 2, i, style)[1] for i in range(n)]


def test_conversation_has_neither_descriptions_nor_reasoning():
    """The dialogues, which have both, are the control."""
    marks = " removed, how many", "would remain without", " the same "         # world.reasoning's

    def counts(style):
        asked = [turn["value"].removeprefix("<image>\n") for t in talks(style) for turn in t[::2]]
        return (sum(q in DESCRIBE for q in asked),
                sum(any(mark in q for mark in marks) for q in asked))
    assert counts("conversation") == (0, 0)
    assert min(counts("dialogue")) > 20
    assert all(len(t) == 10 for t in talks("conversation"))


def arms(**recall):
    """Stands for `describe`: figures by the folder's name."""
    return lambda model, *_, temperature=0.0, **how: {
        "precision": 1., "recall": recall[model], "repeated": 0.,
        "hallucinated": (.4 if model == "imagined" else .1 if model == "web" else .01)}


def test_sharegpt4v_verdicts_follow_the_figures(monkeypatch):
    """Each verdict turns with the one figure that it is about."""
    monkeypatch.setattr(claims, "train_if_missing", lambda args, name, *_: name.split("/")[0])
    monkeypatch.setattr(claims, "share_captioner", lambda *_: ("again", "writer"))
    monkeypatch.setattr(VLM, "from_pretrained", lambda folder: Named(folder))
    monkeypatch.setattr(claims, "linear_probe", lambda *_: {"colour": .5})
    good = {"descriptions": .9, "web": .3, "imagined": .7, "descriptions-frozen": .8,
            "web-frozen": .29, "again": .87, "writer": .6}

    def verdicts(**changed):
        monkeypatch.setattr(claims, "description_scores", arms(**{**good, **changed}))
        made = sharegpt4v(SimpleNamespace(), 0, SCENES[:4])
        return [claim["holds"] for claim in made.values()]
    assert verdicts() == [True] * 6
    assert verdicts(web=.95)[0] is False
    assert verdicts(**{"descriptions-frozen": .95})[3:5] == [False, False]
    assert verdicts(**{"web-frozen": .1})[3:5] == [True, False]
    assert verdicts(again=.85)[5] is False


class Named(str):
    vision = None


def test_llava_verdicts_follow_the_figures(monkeypatch):
    monkeypatch.setattr(claims, "train_if_missing", lambda args, name, *_: name)
    right = {"llava/stage1": .1, "conversation/stage2": .5, "llava/stage2": .9,
             "no-stage1/stage2": .6}

    def verdicts(**changed):
        figures = {**right, **{k.replace("_", "/"): v for k, v in changed.items()}}
        monkeypatch.setattr(claims, "llava_scores", lambda folder, *_: {"overall":
                                                                         figures[folder]})
        return [c["holds"] for c in llava(None, 0, SCENES[:4]).values()]
    assert verdicts() == [True, True]
    assert verdicts(conversation_stage2=.95) == [False, True]
    assert verdicts(llava_stage1=.55) == [False, True]
    assert verdicts(**{"no-stage1_stage2": .91}) == [True, False]


def test_the_three_kinds_are_averaged(monkeypatch):
    kinds = dict.fromkeys(KINDS, .5) | {"reasoning": .2, "recall": .8}
    monkeypatch.setattr(VLM, "from_pretrained", lambda folder: folder)
    monkeypatch.setattr(claims, "score", lambda *_: kinds)
    assert llava_scores("m", SimpleNamespace(scenes=9)) == {
        "overall": .5, "conversation": .5, "detail": .8, "reasoning": .2}


def test_a_captioner_sees_a_tenth_and_writes_the_rest(tmp_path, monkeypatch):
    """Every picture once: true words for the tenth, the captioner's for the others."""
    monkeypatch.setitem(claims.TOY, "sharegpt4v", (
        {**claims.TOY["sharegpt4v"][0], "steps": 5, "batch": 8}, None))
    asked, run = {}, []

    def trained(args, name, seed, *flags):
        asked[name] = dict(zip(map(str, flags[::2]), map(str, flags[1::2])))
        return tmp_path / name

    def captioned(script, *flags):
        run.append(script)
        folder, out = flags[1], flags[flags.index("--out") + 1]
        out.write_text(json.dumps([{"id": p.name, "image": p.name, "conversations": [
            {"from": "human", "value": "<image>\nx"}, {"from": "gpt", "value": "written"}]}
            for p in sorted(folder.iterdir())]))
    monkeypatch.setattr(claims, "train_if_missing", trained)
    monkeypatch.setattr(claims, "run_script", captioned)
    share_captioner(SimpleNamespace(runs=str(tmp_path)), 3, "start")
    place = tmp_path / "seed3"
    tenth, rows = (json.loads((place / f"{name}.json").read_text()) for name in ("tenth", "all"))
    assert [r["image"] for r in rows] == [f"{i:05}.png" for i in range(40)] and len(tenth) == 4
    for i, row in enumerate(rows):
        true = training_sample(3, 1, i, "descriptions")
        said = row["conversations"][-1]["value"]
        assert said == (true[1][-1]["value"] if i < 4 else "written")
    assert Image.open(place / "pictures/00007.png").tobytes() == training_sample(
        3, 1, 7, "descriptions")[0].tobytes()
    assert {k: asked["captioner/stage1"][k] for k in ("--steps", "--train", "--from")} == {
        "--steps": "5", "--train": "vision.blocks.2+,projector,llm", "--from": "start"}
    assert [asked[n]["--data"].rsplit("/")[-1] for n in asked] == ["tenth.json", "all.json"]
    share_captioner(SimpleNamespace(runs=str(tmp_path)), 3, "start")
    assert len(run) == 1                                    # what is written stays


def test_the_picture_shows_every_claim(tmp_path, monkeypatch):
    from matplotlib import pyplot
    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    claim = {"arms": {"one": {"recall": .5, "words": 30., "tower": .9},
                      "two": {"recall": .7, "words": 20.}}, "holds": True}
    draw(tmp_path / "c.png", {"paper": [{"it helps": claim}] * 3,
                                                 "other": [{"a": claim, "b": claim}] * 3})
    assert Image.open(tmp_path / "c.png").size[1] > 150
    panels = [ax for ax in drawn[0].axes if ax.get_title(loc="left")]
    assert [ax.get_title(loc="left") for ax in panels] == [
        f"{title}\nheld in 3 of 3 seeds" for title in ("paper: it helps", "other: a", "other: b")]
    for ax in panels:           # recall of two arms, tower of one, three seeds; words are no share
        assert [len(dots.get_offsets()) for dots in ax.collections[:-1]] == [6, 3]
        assert [label.get_text() for label in ax.get_legend().get_texts()] == ["recall", "tower"]


def test_a_child_that_fails_ends_the_claims_with_its_code():
    with pytest.raises(SystemExit) as left:
        run_script("train.py", "--stage", 9)
    assert left.value.code == 2
    run_script("train.py", "--help")                  # the control


def test_captioners_are_not_asked_questions(monkeypatch):
    """Their template throws questions away: accuracies would be of nothing."""
    made = SimpleNamespace(template="blip2", aspect="squash")
    monkeypatch.setattr(VLM, "from_pretrained", lambda folder: made)
    args = SimpleNamespace(model=["m"], scenes=20, controls=False)
    with pytest.raises(UsageError, match="would not read the questions.*--descriptions"):
        eval_toy(args)
    made.template, made.aspect, made.image_size = "v1", "anyres", 64
    with pytest.raises(UsageError, match="not cut in tiles"):
        answers(made, ["x"], torch.zeros(1), 5)


def test_descriptions_alone_are_scored_of_captioners_too(monkeypatch, capsys):
    """True descriptions, true ones of other scenes, and cut ones: each figure says which."""
    made = SimpleNamespace(template="blip2", aspect="squash", image_size=SIDE)
    monkeypatch.setattr(VLM, "from_pretrained", lambda folder: made)
    told = {"true": [description(s) for s in held_out_scenes(20)]}
    told["other"] = told["true"][11:] + told["true"][:11]
    told["cut"] = [text[:-3] for text in told["true"]]
    found = {}
    for name, texts in told.items():
        monkeypatch.setattr(toy, "descriptions", lambda *_, texts=texts: texts)
        args = parse(["toy", "--descriptions", "--no-controls", "--scenes", "20", "--model", "m"])
        found[name] = eval_toy(args)["runs"][0]["right"]
        assert "breaks off" in capsys.readouterr().out
    perfect = {"precision": 1, "recall": 1, "hallucinated": 0, "repeated": 0, "breaks off": 0}
    assert {k: found["true"][k] for k in perfect} == perfect
    assert found["other"]["precision"] < .5 and found["other"]["breaks off"] == 0
    assert found["cut"]["breaks off"] == 1 and found["cut"]["precision"] == 1


def test_a_loss_is_called_flat_by_its_last_quarters(tmp_path):
    """1 - last quarter / the one before: .5 of a line that halves, 0 of one that stands still."""
    for losses, falls in (([4] * 4 + [3] * 4 + [2] * 4 + [1] * 4, .5), ([1] * 16, 0),
                          ([9] * 8 + [1] * 8, 0), ([1] * 12 + [2] * 4, -1)):
        rows = "".join(json.dumps({"loss": x}) + "\n" for x in losses)
        (tmp_path / "metrics.jsonl").write_text(rows)
        assert claims.falls_by(tmp_path / "model") == pytest.approx(falls)


def test_blip2_and_minigpt4_are_tried_at_two_budgets_from_the_right_starts(monkeypatch):
    """Equal steps in all for Figure 5; MiniGPT-4 starts from what is shipped."""
    asked = {}

    def trained(args, name, seed, *flags):
        asked[name] = dict(zip(flags[::2], flags[1::2]))
        return name
    monkeypatch.setattr(claims, "train_if_missing", trained)
    monkeypatch.setattr(claims, "falls_by", lambda folder: .01)
    monkeypatch.setattr(VLM, "from_pretrained", lambda folder: folder)
    monkeypatch.setattr(claims.Blip2Stage1, "from_pretrained", lambda folder: folder)
    recall = {"blip2-short/stage2": .5, "no-stage1-short/stage2": .6, "blip2-long/stage2": .9,
              "no-stage1-long/stage2": .8}
    monkeypatch.setattr(claims, "description_scores", lambda model, *_: {
        "precision": 1, "recall": recall[model]})
    monkeypatch.setattr(claims, "pairwise_accuracy", lambda *_: {
        "attribute": {"itc": .8, "itm": .9}, "left or right": {"itc": .7, "itm": .9}})
    monkeypatch.setattr(claims, "recall_at_k", lambda model, scenes, itm=True: {
        "image to text 1": .9 - .1 * ("no-itg" in model), "text to image 1": .9})
    found = claims.blip2(None, 0, SCENES[:4])
    assert [claim["holds"] for claim in found.values()] == [False, True, False, True]
    for budget, (one, two) in claims.BUDGETS.items():
        assert asked[f"blip2-{budget}/stage1"]["--steps"] == one
        assert asked[f"no-stage1-{budget}/stage2"]["--steps"] == one + two
        assert asked[f"no-stage1-{budget}/stage2"]["--from"] == "none"
        assert asked[f"blip2-{budget}/stage2"]["--from"] == f"blip2-{budget}/stage1"
    assert claims.BUDGETS["long"] > claims.BUDGETS["short"]
    monkeypatch.setattr(claims, "degeneration_rates", lambda model, scenes: {
        "fails": .9 if "stage1" in model else .1})
    found, = claims.minigpt4(None, 0, SCENES[:4]).values()
    assert found["holds"] and "--qformer" not in asked["minigpt4/stage1"]


def test_places_to_write_are_looked_at_before_the_training(tmp_path, capsys):
    for wrong in (["--out", "/no/such/x.json"], ["--picture", str(tmp_path / "a.foo")],
                  ["--out", str(tmp_path)], ["--scenes", "21"]):
        with pytest.raises(SystemExit):
            parse(["claims", *wrong])
    parse(["claims", "--picture", str(tmp_path / "a.png")])


@pytest.mark.parametrize("count", [20, 22, 30, 500, 502])
def test_another_scenes_picture_has_another_number_of_objects(count):
    things = torch.tensor([1 + i % 4 for i in range(count)])
    assert not (things == things.roll(count // 2 | 1)).any()
    assert count % 4 == 0 or (things == things.roll(count // 2 + 1)).any()      # the control
