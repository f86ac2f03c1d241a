"""evaluate.py's retrieval and claims: the measures themselves, on answers known exactly."""

import json
from types import SimpleNamespace

import pytest
import torch

import evaluate
import world

SCENES = [world.scene(i, "test", 1 + i % 4) for i in range(60)]


class Oracle:
    """A Retriever that knows the truth, spoiled at will: features are scene numbers."""

    def __init__(self, right=True, match=1.):
        self.right, self.scale, self.image_size = right, match, world.SIDE
        self.texts, self.ln_vision = [], lambda x: x
        self.words = SimpleNamespace(encode=self.encode)

    def encode(self, texts):
        self.texts = list(texts)
        return torch.arange(len(texts))[:, None], torch.ones(len(texts), 1, dtype=torch.bool)

    def see(self, pixels):
        """Numbers of the pictures, found again by their pixels."""
        known = evaluate.pictures(SCENES, world.SIDE, "squash")
        return torch.stack([(known == p).flatten(1).all(1).float().argmax() for p in pixels])

    def truth(self, number, text):
        scene = SCENES[int(number)]
        fits = all(f"{world.article(t.name)} in the {t.where}" in text for t in scene.things)
        pair = text.split(" left of ")
        if len(pair) == 2:
            columns = {world.article(t.name): t.column for t in scene.things}
            fits = columns.get(pair[0], 9) < columns.get(pair[1], -9)
        else:
            fits = fits and text.count(" in the ") == len(scene.things)
        return fits == self.right

    def matched(self, features, ids, mask):
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
    found = evaluate.recall(Oracle(), SCENES, k=len(SCENES))
    assert found["image to text 1"] == found["text to image 1"] == 1
    wrong = evaluate.recall(Oracle(right=False), SCENES, k=len(SCENES))
    assert wrong["image to text 1"] < .1                                    # the control
    blind = evaluate.recall(Oracle(), SCENES, k=len(SCENES), itm=False)
    assert blind["image to text 1"] < .1 and blind["image to text 5"] < .2


def test_near_misses_are_near_and_false():
    made = evaluate.near_misses(SCENES)
    assert set(made) == {"attribute", "left or right"}
    assert len(made["attribute"]) == len(SCENES) and len(made["left or right"]) > 10
    oracle = Oracle()
    for rows in made.values():
        for i, true, false in rows:
            assert oracle.truth(i, true) and not oracle.truth(i, false)
            assert not any(f"{c} {s}" in false for c, s in world.KEPT_OUT)
    for _, true, false in made["attribute"]:        # one colour, shape or place apart
        a, b = (text.replace(",", "").split() for text in (true, false))
        a, b = ([w for w in x if w not in ("a", "an")] for x in (a, b))
        assert len(a) == len(b) and 1 <= sum(x != y for x, y in zip(a, b)) <= 2


def test_told_apart_sees_who_knows():
    assert {k: v["itm"] for k, v in evaluate.told_apart(Oracle(), SCENES).items()} == {
        "attribute": 1, "left or right": 1}
    assert {k: v["itm"] for k, v in evaluate.told_apart(Oracle(right=False), SCENES).items()} == {
        "attribute": 0, "left or right": 0}
    assert all(v["itm, other picture"] < .9 for v in evaluate.told_apart(Oracle(), SCENES).values())


@pytest.mark.parametrize("text, ended, repeats, breaks", [
    ("At top left is a red star. There is one object in all.", True, False, False),
    ("A red star. A red star.", True, True, False),
    ("A red star and a red star.", True, True, False),
    ("At top left is a red star. There is one", True, False, True),
    ("At top left is a red star.", False, False, True), ("", True, False, True)])
def test_what_counts_as_repeating_and_breaking_off(text, ended, repeats, breaks):
    assert evaluate.wreck(text, ended) == (repeats, breaks)


def test_a_claim_holds_only_if_all_of_its_figures_say_so():
    arms = {"a": {"x": .9, "y": .4}, "b": {"x": .8, "y": .5}}
    assert evaluate.above(arms, "a", "b", "x")["holds"]
    assert not evaluate.above(arms, "b", "a", "x")["holds"]
    assert not evaluate.above(arms, "a", "b", "x", "y")["holds"]


def test_the_table_says_in_how_many_seeds_a_claim_holds(monkeypatch, capsys, tmp_path):
    def made(args, seed, scenes):
        return {"it helps": evaluate.above({"with": {"recall": .5 + .1 * seed},
                                            "without": {"recall": .55}}, "with", "without",
                                           "recall")}
    monkeypatch.setattr(evaluate, "blip2_claims", made)
    args = evaluate.arguments(["claims", "--only", "blip2", "--scenes", "20", "--out",
                               str(tmp_path / "claims.json")])
    evaluate.main(args)
    out = capsys.readouterr().out
    assert "does not hold here: in 2 of 3 seeds" in out and "0.600 ±0.100" in out
    assert json.loads((tmp_path / "claims.json").read_text())["seeds"] == 3
