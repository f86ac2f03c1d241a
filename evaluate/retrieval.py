"""TODO"""

import random

import torch

from evaluate.toy import scene_pixels
from qformer import Blip2Stage1, max_query_similarity
from toy.texts import article, captions, listed
from toy.world import COLOURS, HELD_OUT_PAIRS, make_scene, PLACES, SHAPES

MAX_TEXT_TOKENS = 35                           # tokens of a text in retrieval, as officially; training has 32


def retrieval_captions(scenes):
    """The short caption that says what is where: hardly two scenes share it."""
    return [captions(scene)[2] for scene in scenes]


def qformer_features(model, scenes):
    """(n, P, Cv): what a Retriever's queries look at."""
    pixels = scene_pixels(scenes, model.image_size, "squash")
    return torch.cat([model.ln_vision(model.encode_vision(x)) for x in pixels.split(100)])


@torch.inference_mode()
def recall_at_k(model, scenes, k=16, itm=True):
    """{"image to text 1", ... 5, "text to image 1", ... 5}: is the right one among so many?

    The first k by ITC's cosine are ordered anew by match logit + cosine, as published (k = 128
    there); itm=False leaves ITC's order. A text that fits two pictures counts for both."""
    texts, seen = retrieval_captions(scenes), qformer_features(model, scenes)
    ids, mask = model.tokenizer.encode(texts, length=MAX_TEXT_TOKENS)
    cosine = max_query_similarity(model.encode_image(seen), model.encode_text(ids, mask))           # (n, n)
    right = torch.tensor([[a == b for b in texts] for a in texts])
    found = {}
    for name, scores, truth, turned in (("image to text", cosine, right, False),
                                        ("text to image", cosine.T, right.T, True)):
        best = scores.topk(k, dim=1)
        rows = torch.arange(len(scores)).repeat_interleave(k)
        order = best.values.clone()
        if itm:
            columns = best.indices.flatten()
            image, text = (columns, rows) if turned else (rows, columns)
            match = torch.cat([model.itm_logits(seen[i], ids[j], mask[j])[:, 1]
                               for i, j in zip(image.split(400), text.split(400))])
            order += match.view(-1, k)
        ranked = best.indices.gather(1, order.argsort(1, descending=True))
        hits = truth.gather(1, ranked)
        for n in (1, 5):
            found[f"{name} {n}"] = float(hits[:, :n].any(1).float().mean())
    return found


def eval_retrieval(args):
    """Print recall@1 and @5 in both directions, by ITC alone and by the published score."""
    model = Blip2Stage1.from_pretrained(args.model)
    scenes = [make_scene(i, "test", 1 + i % 4) for i in range(args.scenes)]
    made = {"itc": recall_at_k(model, scenes, itm=False), "itc + itm": recall_at_k(model, scenes)}
    print(f"{args.scenes} held-out scenes; chance is {1 / args.scenes:.3f} and "
          f"{5 / args.scenes:.3f}")
    for name, row in made.items():
        print(f"{name:<12}" + "".join(f"  {k} {v:.3f}" for k, v in row.items()))
    return made


def hard_negative_pairs(scenes):
    """{kind: [(scene index, true text, false text)]}: one attribute changed, or left for right."""
    made = {"attribute": [], "left or right": []}
    for i, scene in enumerate(scenes):
        dice, things = random.Random(f"near:{i}"), list(scene.things)
        texts = [f"{article(t.name)} in the {t.where}" for t in things]
        at, part = dice.randrange(len(things)), dice.randrange(3)
        t, present = things[at], {t.name for t in things}
        other = [f"{article(f'{c} {s}')} in the {w}"
                 for c in COLOURS for s in SHAPES for w in PLACES
                 if (c != t.colour) + (s != t.shape) + (w != t.where) == 1
                 and (c != t.colour, s != t.shape, w != t.where)[part]
                 and (c, s) not in HELD_OUT_PAIRS and (f"{c} {s}" not in present or part == 2)]
        wrong = texts[:at] + [dice.choice(other)] + texts[at + 1:] if other else None
        if wrong:
            made["attribute"].append((i, listed(texts), listed(wrong)))
        pairs = [(a, b) for a in things for b in things if a.column < b.column]
        if pairs:
            a, b = (article(t.name) for t in dice.choice(pairs))
            made["left or right"].append((i, f"{a} left of {b}", f"{b} left of {a}"))
    return made


@torch.inference_mode()
def pairwise_accuracy(model, scenes):
    """{kind: (ITC's rate, ITM's rate)} of near misses in which the true text has the higher score.

    The control: ITM with another scene's picture, which must fall to a half."""
    everything, rates = qformer_features(model, scenes), {}
    for kind, rows in hard_negative_pairs(scenes).items():
        ids, mask = model.tokenizer.encode([text for _, *two in rows for text in two], length=MAX_TEXT_TOKENS)
        seen, ids, mask = (everything[[i for i, *_ in rows]], ids.unflatten(0, (-1, 2)),
                           mask.unflatten(0, (-1, 2)))
        wrong = seen.roll(len(rows) // 2, 0)

        def rate(shown, score):
            true, false = (torch.cat([score(x, i, m) for x, i, m in zip(
                shown.split(200), ids[:, j].split(200), mask[:, j].split(200))]) for j in (0, 1))
            return float((true > false).float().mean())
        cosine = lambda x, i, m: max_query_similarity(model.encode_image(x),
                                            model.encode_text(i, m)).diagonal()
        match = lambda x, i, m: model.itm_logits(x, i, m)[:, 1]
        rates[kind] = {"itc": rate(seen, cosine), "itm": rate(seen, match),
                       "itm, other picture": rate(wrong, match)}
    return rates
