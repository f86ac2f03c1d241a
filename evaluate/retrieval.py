"""evaluate.retrieval: BLIP-2 after its first stage finds texts for pictures and pictures for texts.

Two scores of a (picture, text) pair, [BLIP2] 2301.12597:

    ITC   the largest cosine over the queries: one matrix product for all pairs
    ITM   the match logit: the Q-Former reads picture and text together, one pass a pair

The published ranking uses both: the best k by ITC are sorted again by match logit + cosine. On
official files (Karpathy's splits of COCO and Flickr30k) as well as in the toy world.
`pairwise_accuracy` asks a harder question: which of two texts that differ in one word is true?
"""
import random

import torch

import data
from evaluate.karpathy import read_pictures
from evaluate.toy import held_out_scenes, scene_pixels
from formats.pictures import picture_path
from qformer import Blip2Stage1, max_query_similarity
from toy.texts import article, captions, listed
from toy.world import COLOURS, HELD_OUT_PAIRS, PLACES, SHAPES

MAX_TEXT_TOKENS = 35                    # in retrieval, as officially; training has 32


def retrieval_captions(scenes):
    """The short caption that says what is where: hardly two scenes share it."""
    return [captions(scene)[2] for scene in scenes]


def qformer_features(model, scenes):
    """(n, P, Cv): what the queries of a Blip2Stage1 attend to."""
    pixels = scene_pixels(scenes, model.image_size, "squash")
    return torch.cat([model.ln_vision(model.encode_vision(x)) for x in pixels.split(100)])


def match_logits(model, features, ids, mask, size):
    """(n,) logits of "yes" for n (picture, text) pairs, `size` pairs at a time."""
    chunks = zip(features.split(size), ids.split(size), mask.split(size))
    return torch.cat([model.itm_logits(x, i, m)[:, 1] for x, i, m in chunks])


@torch.inference_mode()
def recall_at_k(model, scenes, k=16, itm=True):
    """{"image to text 1", ... 5, "text to image 1", ... 5}: is the right one among the first n?

    The first k by ITC's cosine are sorted again by match logit + cosine, as published (k = 128
    there); itm=False leaves ITC's order. A text that fits two pictures counts for both."""
    texts, features = retrieval_captions(scenes), qformer_features(model, scenes)
    ids, mask = model.tokenizer.encode(texts, length=MAX_TEXT_TOKENS)
    cosine = max_query_similarity(model.encode_image(features), model.encode_text(ids, mask))
    is_true = torch.tensor([[a == b for b in texts] for a in texts])    # (images, texts)
    found = {}
    for name, scores, truth in (("image to text", cosine, is_true),
                                ("text to image", cosine.T, is_true.T)):
        best = scores.topk(k, dim=1)
        order = best.values.clone()                                     # (n, k)
        if itm:
            rows = torch.arange(len(scores)).repeat_interleave(k)       # (n * k,)
            columns = best.indices.flatten()
            image, text = (rows, columns) if name == "image to text" else (columns, rows)
            pairs = zip(image.split(400), text.split(400))              # features of 400 at a time
            match = torch.cat([model.itm_logits(features[i], ids[j], mask[j])[:, 1]
                               for i, j in pairs])
            order += match.view(-1, k)
        ranked = best.indices.gather(1, order.argsort(1, descending=True))
        hits = truth.gather(1, ranked)
        for n in (1, 5):
            found[f"{name} {n}"] = float(hits[:, :n].any(1).float().mean())
    return found


def eval_retrieval(args):
    """Print recall in both directions, by ITC alone and by the published score: of the toy world
    @1 and @5, of official files @1, @5 and @10."""
    if args.references:
        return eval_files(args)
    model = Blip2Stage1.from_pretrained(args.model)
    scenes = held_out_scenes(args.scenes)
    table = {"itc": recall_at_k(model, scenes, itm=False), "itc + itm": recall_at_k(model, scenes)}
    print(f"{args.scenes} held-out scenes; chance is {1 / args.scenes:.3f} and "
          f"{5 / args.scenes:.3f}")
    for name, row in table.items():
        print(f"{name:<12}" + "".join(f"  {k} {v:.3f}" for k, v in row.items()))
    return table


# ---------------------------------------------------------------------------- official files

def file_features(model, args, pictures):
    """Yield ([numbers], features (n, P, Cv)) of so many pictures at a time."""
    for first in range(0, len(pictures), args.batch_size):
        chunk, pixels = pictures[first:first + args.batch_size], []
        for picture in chunk:
            path = picture_path(args.images, picture["image"], args.follow_links)
            pixels.append(data.preprocess(data.load_image(path), model.image_size, "squash"))
        features = model.ln_vision(model.encode_vision(torch.cat(pixels)))
        yield range(first, first + len(chunk)), features


def match_wanted(model, args, pictures, wanted, ids, mask):
    """(images, texts) match logits where `wanted` is True. The pictures are read once more: the
    features of 5,000 would be 7 GB."""
    match = torch.zeros(wanted.shape)
    for numbers, features in file_features(model, args, pictures):
        for row, image in zip(features, numbers):
            texts = wanted[image].nonzero()[:, 0]
            for part in texts.split(args.batch_size):
                logits = model.itm_logits(row.expand(len(part), -1, -1), ids[part], mask[part])
                match[image, part] = logits[:, 1].float()
    return match


def recalls(scores, is_true, name):
    """{"name 1", "name 5", "name 10"}: is a right one among the first n? scores, is_true (n, k)."""
    hits = is_true.gather(1, scores.argsort(1, descending=True))
    return {f"{name} {n}": float(hits[:, :n].any(1).float().mean()) for n in (1, 5, 10)}


@torch.inference_mode()
def file_recalls(model, args, pictures):
    """{"itc": recalls, "itc + itm": recalls} of pictures with several captions each."""
    texts, owner = [], []
    for i, picture in enumerate(pictures):
        texts += picture["captions"]
        owner += [i] * len(picture["captions"])
    ids, mask = model.tokenizer.encode(texts, length=MAX_TEXT_TOKENS)
    chunks = zip(ids.split(args.batch_size), mask.split(args.batch_size))
    told = torch.cat([model.encode_text(i, m) for i, m in chunks])
    seen = [model.encode_image(features) for _, features in file_features(model, args, pictures)]
    cosine = torch.cat([max_query_similarity(image, told) for image in seen])  # (images, texts)
    is_true = torch.tensor(owner)[None, :] == torch.arange(len(pictures))[:, None]
    to_text = cosine.topk(min(args.top, cosine.shape[1])).indices             # (images, k)
    to_image = cosine.T.topk(min(args.top, cosine.shape[0])).indices          # (texts, k)
    wanted = torch.zeros_like(is_true).scatter_(1, to_text, True)
    wanted |= torch.zeros_like(is_true.T).scatter_(1, to_image, True).T
    both = cosine + match_wanted(model, args, pictures, wanted, ids, mask)
    table = {}
    for name, scores in (("itc", cosine), ("itc + itm", both)):
        table[name] = {
            **recalls(scores.gather(1, to_text), is_true.gather(1, to_text), "image to text"),
            **recalls(scores.T.gather(1, to_image), is_true.T.gather(1, to_image),
                      "text to image")}
    return table


def eval_files(args):
    """Print the recalls of Karpathy's split of COCO or Flickr30k, or of a file like it."""
    pictures = read_pictures(args.references, args.images, args.split)
    model = Blip2Stage1.from_pretrained(args.model)
    table = file_recalls(model, args, pictures)
    count = sum(len(picture["captions"]) for picture in pictures)
    print(f"{len(pictures):,} pictures, {count:,} captions; the best {args.top} by ITC are sorted "
          "again by match logit + cosine")
    for name, row in table.items():
        print(f"{name:<12}" + "".join(f"  {key} {100 * rate:.1f}" for key, rate in row.items()))
    return table


# ------------------------------------------------------------------------ one word is wrong

def one_attribute_changed(t, attribute, present):
    """Captions of object t with another colour (0), shape (1) or place (2), false of the scene."""
    found = []
    for colour in COLOURS:
        for shape in SHAPES:
            for place in PLACES:
                changed = (colour != t.colour, shape != t.shape, place != t.where)
                if sum(changed) != 1 or not changed[attribute]:
                    continue
                # another colour or shape may name an object that is in the scene: a true text
                is_new = attribute == 2 or f"{colour} {shape}" not in present
                if is_new and (colour, shape) not in HELD_OUT_PAIRS:
                    found.append(f"{article(f'{colour} {shape}')} in the {place}")
    return found


def hard_negative_pairs(scenes):
    """{kind: [(scene index, true text, false text)]}: one attribute changed, or left for right."""
    pairs = {"attribute": [], "left or right": []}
    for i, scene in enumerate(scenes):
        rng, things = random.Random(f"near:{i}"), list(scene.things)
        texts = [f"{article(t.name)} in the {t.where}" for t in things]
        at, attribute = rng.randrange(len(things)), rng.randrange(3)
        others = one_attribute_changed(things[at], attribute, {t.name for t in things})
        if others:
            false = texts[:at] + [rng.choice(others)] + texts[at + 1:]
            pairs["attribute"].append((i, listed(texts), listed(false)))
        beside = [(a, b) for a in things for b in things if a.column < b.column]
        if beside:
            a, b = (article(t.name) for t in rng.choice(beside))
            pairs["left or right"].append((i, f"{a} left of {b}", f"{b} left of {a}"))
    return pairs


@torch.inference_mode()
def pairwise_accuracy(model, scenes):
    """{kind: {score: rate}} of hard negative pairs in which the true text has the higher score.

    The control is ITM with another scene's picture, which must fall to a half."""
    def itc_scores(x, ids, mask):
        found = []
        for start in range(0, len(x), 200):
            part = slice(start, start + 200)
            cosine = max_query_similarity(model.encode_image(x[part]),
                                          model.encode_text(ids[part], mask[part]))
            found.append(cosine.diagonal())             # picture b with its own text b
        return torch.cat(found)

    def itm_scores(x, ids, mask):
        return match_logits(model, x, ids, mask, 200)

    everything, rates = qformer_features(model, scenes), {}
    for kind, rows in hard_negative_pairs(scenes).items():
        texts = []
        for _, true, false in rows:
            texts += [true, false]
        ids, mask = model.tokenizer.encode(texts, length=MAX_TEXT_TOKENS)
        features = everything[[i for i, *_ in rows]]
        other = features.roll(len(rows) // 2, 0)

        def rate(x, score):
            true = score(x, ids[::2], mask[::2])
            false = score(x, ids[1::2], mask[1::2])
            return float((true > false).float().mean())
        rates[kind] = {"itc": rate(features, itc_scores), "itm": rate(features, itm_scores),
                       "itm, other picture": rate(other, itm_scores)}
    return rates
