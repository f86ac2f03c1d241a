"""trainer/qformer_job.py: the toy's own Q-Former, trained from nothing on the toy world (stage 0).

    python train.py --stage 0 --part qformer      writes runs/toy/stage0/qformer/, shipped as
                                                  toy/weights/qformer/

It stands in for Salesforce's checkpoint, which has been through both stages of BLIP-2. Here they
run side by side on the shipped CLIP and LLaMA, which stay frozen:

    itc, itm, itg    stage 1: captions of scenes beside their twins (toy/twins.py), descriptions
    lm               stage 2: the LLaMA describes the scene from the queries' outputs

Why the last one: ITG reads the queries' keys and values, of which the last block's are made from
that block's *input*; ITC wants one good query, and ITM a mean over all. Nothing in the three asks
the outputs for all objects, and the outputs are all that a language model gets.

[BLIP-2] 2301.12597.  Next: evaluate/qformer_parts.py, the gates that the result must pass.
"""
import math
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import data
from formats.folders import leave_out_tower
from kernels import linear_cross_entropy
from llama import Llama
from projector import splice
from qformer import hard_negatives, itc, itc_loss, similarities
from toy.parts import muon
from toy.rows import conversation
from toy.texts import description
from toy.twins import caption_of, draw_kind, is_true, KINDS, pair_of
from toy.world import draw, training_scene
from trainer.build import match_embedding_scale, new_toy_stage1

WEIGHTS = Path(__file__).parents[1] / "toy/weights"
PAIRS = 16                      # scenes of a step, each with its twin
MOST_TOKENS = 64                # more than any caption or description has

# What the captions of a step say (toy/twins.py), and when. ITM learns to compare one object within
# 400 steps; from captions of four objects and twelve details, one of them wrong, its loss was still
# .36 after 2,600. So most captions say first where one object is.
FIRST_STEPS, LATE_STEPS = 6400, 1600    # two schedules, the second at .6 of the rate
ONE_OBJECT_STEPS = 800
LAST_FROM = 3400                # from here on most say where all objects are: ITM's loss of that is
LAST_KINDS = KINDS | {"one": 1, "where": 14, "relation": 4}     # .24 then, of two objects .06
# After the first schedule a caption's first two objects were compared without an error, its third
# and fourth not at all. So the second begins with one object anywhere in the row, and goes on with
# a third or fourth one while some of the others are hidden.
LATE_KINDS = {"one": 6, "late": 6, "where": 4, "some": 2, "relation": 2, "count": 1}
SHIFTED_STEPS = 500
MOST_SHIFT = 24                 # so many tokens later a caption names the last of four objects


def kind_of(step):
    """What the captions of a step say."""
    is_first = step < ONE_OBJECT_STEPS or 0 <= step - FIRST_STEPS < SHIFTED_STEPS
    if is_first and step % 4:
        return "one"
    weights = KINDS if step < LAST_FROM else LAST_KINDS
    if step >= FIRST_STEPS:
        weights = LATE_KINDS
    return draw_kind(random.Random(f"kind:{step}"), weights)


def some_hidden(shown, step):
    """shown: pairs of (scene, "where" fact). Of each pair, half of the objects that both facts have
    alike are hidden: (pairs with facts of what is left, the numbers of the hidden objects)."""
    rng, found, hidden = random.Random(f"hidden:{step}"), [], []
    for (scene, fact), (twin, other) in zip(shown[::2], shown[1::2]):
        pair, gone = (fact[1], other[1]), ()
        if len(pair[0]) == len(pair[1]):
            gone = [i for i, (a, b) in enumerate(zip(*pair)) if a == b and rng.random() < .5]
        for picture, said in ((scene, pair[0]), (twin, pair[1])):
            kept = tuple(item for i, item in enumerate(said) if i not in gone)
            found.append((picture, ("one", kept) if gone else ("where", said)))
            hidden.append(gone)
    return found, hidden


def hidden_words(ids, hidden, separators):
    """(B, T) bool: the words of the objects that are hidden, and the comma or "and" behind them.
    ids (B, T) of lists; hidden: B lists of numbers of objects; separators: their ids."""
    number = torch.isin(ids, separators).cumsum(1)
    number = F.pad(number[:, :-1], (1, 0))              # a separator belongs to what it ends
    found = torch.zeros_like(ids, dtype=torch.bool)
    for row, gone in enumerate(hidden):
        for i in gone:
            found[row] |= number[row] == i
    found[:, 0] = False                                 # [CLS]
    return found


def shifted(ids, mask, by, pad):
    """ids, mask (B, T) with `by` hidden tokens behind [CLS] -> (B, T + by) each: the words stand at
    later positions."""
    hidden = ids.new_full((len(ids), by), pad)
    return (torch.cat((ids[:, :1], hidden, ids[:, 1:]), 1),
            torch.cat((mask[:, :1], torch.zeros_like(hidden, dtype=mask.dtype), mask[:, 1:]), 1))


class Batches:
    """step -> [one micro-batch]: a dict of tensors of 2 * PAIRS pictures and their texts.

    pixels (B, 3, S, S); caption, told: (ids, mask) (B, T) of the captions, which ITC and ITM
    compare, and of what ITG writes, descriptions and captions in turn; is_true (B, B): text k is
    true of picture b; described: (indices of PAIRS / 2 pictures, ids, labels) for the LLaMA.

    All captions of a step are of one kind: then all are about as long, and little is padded, and
    no caption is told from another by its kind."""

    def __init__(self, model, words):
        self.tokenizer, self.image_size, self.words = model.tokenizer, model.image_size, words
        self.separators = model.tokenizer.encode([", and"], MOST_TOKENS)[0][0, 1:3]

    def __call__(self, step):
        shown, kind, shift = [], kind_of(step), 0
        if kind == "one" and step >= FIRST_STEPS:
            shift = random.Random(f"shift:{step}").randint(0, MOST_SHIFT)
        for i in range(step * PAIRS, (step + 1) * PAIRS):
            shown += pair_of(training_scene(f"qformer:{i}"), i, kind)
        texts = [caption_of(fact) for _, fact in shown]
        told, hidden = texts, [()] * len(shown)
        if kind == "late" and step >= FIRST_STEPS + SHIFTED_STEPS:
            shown, hidden = some_hidden(shown, step)
        if step % 2:
            told = [description(scene) for scene, _ in shown]
        pixels = [data.preprocess(draw(scene), self.image_size, "squash") for scene, _ in shown]
        truth = [[is_true(fact, scene) for _, fact in shown] for scene, _ in shown]
        ids, mask = self.tokenizer.encode(texts, MOST_TOKENS)
        mask[hidden_words(ids, hidden, self.separators) & (ids != self.tokenizer.sep)] = False
        return [{"pixels": torch.cat(pixels),
                 "caption": shifted(ids, mask, shift, self.tokenizer.pad),
                 "told": self.tokenizer.encode(told, MOST_TOKENS),
                 "is_true": torch.tensor(truth),
                 "described": self.described(shown, step), "seed": step}]

    def described(self, shown, step):
        """A picture of every pair of the first half, and its description as stage 0 had it."""
        rng, rows = random.Random(f"described:{step}"), []
        chosen = [2 * i + rng.randrange(2) for i in range(PAIRS // 2)]
        for i in chosen:
            talk = conversation([("<image>", description(shown[i][0]))])
            rows.append(data.encode(talk, "plain", self.words))
        return torch.tensor(chosen), *data.collate(rows, self.words.pad)


class Lessons(nn.Module):
    """The four losses of one micro-batch. `proj` is thrown away when training ends: what comes
    after has a layer of its own, as in MiniGPT-4."""

    def __init__(self, model, llm):
        super().__init__()
        self.model, self.llm = model, llm.requires_grad_(False)
        self.proj = nn.Linear(model.qformer.config.width, llm.config.width)
        match_embedding_scale(self.proj, self.proj, model.qformer.config.width, llm)

    def forward(self, micro):
        model, (ids, mask), is_true = self.model, micro["caption"], micro["is_true"]
        queries_kv, out = [], {}
        # as for CLIP and LLaMA. Compiling, too, would gain a tenth and take three minutes
        with torch.autocast("cpu", torch.bfloat16):
            vision = model.encode_vision(micro["pixels"])
            features = model.ln_vision(vision)                                  # (B, P, Cv)
            outputs = model.qformer(features, allow=itc, store=queries_kv)      # (B, Q, C)
            image, text = model.vision_proj(outputs), model.encode_text(ids, mask)
            out["itg"] = model.caption_loss(*micro["told"], queries_kv)
            out["lm"] = self.describing_loss(outputs, *micro["described"])
        image, text = F.normalize(image.float(), dim=-1), text.float()
        # unlike the published loss both sides learn from both rows: there is one process
        to_text, to_image = similarities(image, text, image, text, model.temp)  # (B, B) each
        out["itc"] = (itc_loss(to_text, to_text, is_true)
                      + itc_loss(to_image, to_image, is_true.T)) / 2
        # a text that is true of another picture, too, is no negative of it
        own = torch.eye(len(ids), dtype=torch.bool)
        negatives = hard_negatives(to_text.masked_fill(is_true & ~own, -torch.inf),
                                   to_image.masked_fill(is_true.T & ~own, -torch.inf), own,
                                   micro["seed"])
        with torch.autocast("cpu", torch.bfloat16):
            out["itm"] = model.matching_loss(vision, features, ids, mask, 0, negatives)
        return out

    def describing_loss(self, outputs, chosen, ids, labels):
        """The LLaMA's next token. outputs (B, Q, C) of the queries; chosen (b) of them; ids and
        labels (b, T), with IMAGE where the Q vectors go."""
        embeds = self.proj(outputs[chosen])                                     # (b, Q, C')
        x, labels, _ = splice(ids, self.llm.embed(ids.clamp(min=0)), list(embeds), labels)
        hidden, targets = self.llm.predictions(x, labels)
        return linear_cross_entropy(hidden, self.llm.head.weight, targets)


def qformer_job(out):
    """The arguments of train.TrainJob. out: the run's folder, where nothing is needed."""
    torch.manual_seed(0)
    words = data.Tokenizer(WEIGHTS / "llama")
    model = new_toy_stage1(WEIGHTS / "clip")
    lessons = Lessons(model, Llama.from_pretrained(WEIGHTS / "llama"))

    def save_model(folder):
        model.save_pretrained(folder)
        leave_out_tower(folder, "toy/weights/clip")

    def lr_scale(step):         # twice 50 steps of warm-up, then a cosine to 0; at last lower
        peak, steps = 1, FIRST_STEPS
        if step >= FIRST_STEPS:
            peak, steps, step = .6, LATE_STEPS, step - FIRST_STEPS
        return peak * min(1, (step + 1) / 50) * (1 + math.cos(math.pi * step / steps)) / 2
    trained = {name: p for name, p in lessons.named_parameters() if p.requires_grad}
    return dict(model=lessons, optimizers=muon(trained, .008, 1e-3, decay=.01),
                steps=FIRST_STEPS + LATE_STEPS,
                batches=Batches(model, words), loss=lessons, lr_scale=lr_scale,
                save_model=save_model, clip=1.0, batch=2 * PAIRS)
