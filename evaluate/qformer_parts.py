"""evaluate.qformer_parts: the gates of the shipped Q-Former, on held-out scenes.

    places        what a small read-out of the queries' outputs says of each of the nine places
    retrieval     captions of pictures and pictures of captions: ITC, and the published score
    near misses   two captions that differ in one word: ITC and ITM, and ITM with another picture;
                  and by which object of a list has the wrong word

The read-out is one layer of attention, trained on the frozen outputs: a learned vector for each
place asks the queries, and linear layers name the colour and the shape of what stands there, or
"nothing". So it finds only what some query holds, and what can be looked up by its place.
"""
import random

import torch
import torch.nn.functional as F
from torch import nn

from evaluate.retrieval import (
    match_logits, MAX_TEXT_TOKENS, one_attribute_changed, pairwise_accuracy, qformer_features,
    recall_at_k)
from evaluate.toy import eval_parts, held_out_scenes, print_gates
from qformer import Blip2Stage1, itc
from toy.texts import article, listed
from toy.world import COLOURS, make_scene, PLACES, SHAPES

NOTHING = 0                             # class of a place where nothing stands
MOST_SCENES = 500                       # of retrieval and near misses
GATES = {"colour": (">=", .95), "shape": (">=", .95), "place": (">=", .90)}
RETRIEVAL_GATES = {name: (">=", .95) for name in ("image to text 1", "text to image 1")}
ITM_GATES = {"attribute": (">=", .95), "left or right": (">=", .90)}


@torch.inference_mode()
def query_outputs(model, scenes):
    """(n, Q, C): what a Blip2Stage1's queries bring back from pictures of the scenes."""
    found = [model.qformer(x, allow=itc) for x in qformer_features(model, scenes).split(200)]
    return torch.cat(found).clone()


def truth_of(scenes):
    """(n, 9, 2): class of the colour and of the shape at each place, 0 where nothing stands."""
    truth = torch.full((len(scenes), len(PLACES), 2), NOTHING)
    for row, scene in zip(truth, scenes):
        for t in scene.things:
            row[t.place] = torch.tensor([1 + list(COLOURS).index(t.colour),
                                         1 + SHAPES.index(t.shape)])
    return truth


class ReadOut(nn.Module):
    """outputs (n, Q, C) -> logits (n, 9, 1 + colours) and (n, 9, 1 + shapes)."""

    def __init__(self, width, heads=4):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.place = nn.Parameter(torch.randn(len(PLACES), width))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.colour = nn.Linear(width, 1 + len(COLOURS))
        self.shape = nn.Linear(width, 1 + len(SHAPES))

    def forward(self, outputs):
        x, asked = self.norm(outputs), self.place.expand(len(outputs), -1, -1)
        found, _ = self.attention(asked, x, x, need_weights=False)              # (n, 9, C)
        return self.colour(found), self.shape(found)


def train_read_out(outputs, truth, steps=1200):
    """A ReadOut of these outputs (n, Q, C); truth (n, 9, 2). Deterministic."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        read_out = ReadOut(outputs.shape[-1])
        adam = torch.optim.AdamW(read_out.parameters(), 3e-3, weight_decay=.01)
        for step in range(steps):
            for group in adam.param_groups:
                group["lr"] = 3e-3 * (1 - step / steps)
            pick = torch.randint(len(outputs), (128,))
            colour, shape = read_out(outputs[pick])
            adam.zero_grad()
            (F.cross_entropy(colour.flatten(0, 1), truth[pick, :, 0].flatten())
             + F.cross_entropy(shape.flatten(0, 1), truth[pick, :, 1].flatten())).backward()
            adam.step()
    return read_out


@torch.inference_mode()
def read_out_accuracy(read_out, outputs, truth):
    """{"colour", "shape": share of the objects that are named right at their place; "place": places
    that are taken and said to be, of all that are one or the other}."""
    colour, shape = (logits.argmax(-1) for logits in read_out(outputs))         # (n, 9) each
    taken, said = truth[..., 0] != NOTHING, colour != NOTHING
    return {"colour": float((colour == truth[..., 0])[taken].float().mean()),
            "shape": float((shape == truth[..., 1])[taken].float().mean()),
            "place": float((taken & said).sum() / (taken | said).sum())}


def place_scores(model, scenes):
    """The read-out of a Blip2Stage1's queries on `scenes`, and with the pictures of others."""
    shown = [make_scene(f"probe-{i}") for i in range(max(4 * len(scenes), 2000))]
    read_out = train_read_out(query_outputs(model, shown), truth_of(shown))
    outputs, truth = query_outputs(model, scenes), truth_of(scenes)
    scores = read_out_accuracy(read_out, outputs, truth)
    # an odd step: another number of objects too
    other = read_out_accuracy(read_out, outputs.roll(len(scenes) // 2 | 1, 0), truth)
    return scores | {f"{name}, other picture": score for name, score in other.items()}


def wrong_in_lists(scenes):
    """{which object, from 0: [(scene index, true text, false text)]}: of scenes with three or four
    objects, one object of the list has another colour or shape."""
    pairs = {at: [] for at in range(4)}
    for i, scene in enumerate(scenes):
        rng, things = random.Random(f"list:{i}"), scene.things
        texts = [f"{article(t.name)} in the {t.where}" for t in things]
        for at, t in enumerate(things if len(things) > 2 else ()):
            others = one_attribute_changed(t, rng.randrange(2), {t.name for t in things})
            if others:
                false = texts[:at] + [rng.choice(others)] + texts[at + 1:]
                pairs[at].append((i, listed(texts), listed(false)))
    return pairs


@torch.inference_mode()
def list_accuracy(model, scenes):
    """{which object of a list: rate by ITM of pairs in which the true text has the higher score}"""
    features, rates = qformer_features(model, scenes), {}
    for at, rows in wrong_in_lists(scenes).items():
        texts = [text for row in rows for text in row[1:]]
        ids, mask = model.tokenizer.encode(texts, length=MAX_TEXT_TOKENS)
        x = features[[i for i, *_ in rows]].repeat_interleave(2, 0)
        true, false = match_logits(model, x, ids, mask, 200).view(-1, 2).unbind(1)
        rates[("first", "second", "third", "fourth")[at]] = float((true > false).float().mean())
    return rates


def eval_qformer(model, scenes):
    """Print the gates of a Blip2Stage1. Returns the figures."""
    places = place_scores(model, scenes)
    scenes = scenes[:MOST_SCENES]
    itc_alone = recall_at_k(model, scenes, itm=False)
    reranked = recall_at_k(model, scenes)
    near, lists = pairwise_accuracy(model, scenes), list_accuracy(model, scenes)
    print_gates("Q-Former: a read-out of the queries' outputs, by place", places, GATES)
    print_gates(f"retrieval of {len(scenes)} scenes by ITC", itc_alone, RETRIEVAL_GATES)
    # by the published score it must not be worse
    least = {name: (">=", round(itc_alone[name], 3)) for name in RETRIEVAL_GATES}
    print_gates("the best 16 by ITC sorted again by match logit + cosine", reranked, least)
    by_itc = {kind: rates["itc"] for kind, rates in near.items()}
    by_itm = {kind: rates["itm"] for kind, rates in near.items()}
    other = {kind: rates["itm, other picture"] for kind, rates in near.items()}
    print_gates("one word is wrong: ITC", by_itc, {})
    print_gates("one word is wrong: ITM", by_itm, ITM_GATES)
    print_gates("one word is wrong: ITM with another scene's picture (chance: .5)", other, {})
    print_gates("three or four objects are listed, and this one is wrong: ITM", lists, {})
    return {"places": places, "itc": itc_alone, "itc + itm": reranked, "one word": near,
            "of a list": lists}


def eval_all_parts(args):
    """Print the gates of CLIP, LLaMA and the Q-Former."""
    model = Blip2Stage1.from_pretrained(args.qformer)       # first: a wrong folder shows at once
    figures = eval_parts(args)
    return figures | {"qformer": eval_qformer(model, held_out_scenes(args.scenes))}
