"""trainer/qformer_job.py: the toy's own Q-Former, trained from nothing on the toy world (stage 0).

    python train.py --stage 0 --part qformer      writes runs/toy/stage0/qformer/, shipped as
                                                  toy/weights/qformer/

It stands in for Salesforce's checkpoint, which has been through both stages of BLIP-2. Here they
run side by side on the shipped CLIP and LLaMA, which stay frozen:

    itc, itm, itg    stage 1: captions of scenes beside their twins (toy/twins.py), descriptions
    lm               stage 2: the LLaMA describes the scene from the queries' outputs
    object           which object of a caption is not in the picture? A quarter of the queries is
                     asked for the first one that is named, a quarter for the second, ...

Why the last two. lm: ITG reads the queries' keys and values, of which the last block's are made
from that block's *input*; ITC wants one good query, and ITM a mean over all. Nothing in the three
asks the outputs for all objects, and the outputs are all that a language model gets. object: from
ITM's yes or no alone all queries learn to compare the first two objects of a list, and none ever
compares the third.

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
from qformer import hard_negatives, itc, itc_loss, itm, itm_loss, similarities
from toy.parts import muon
from toy.rows import conversation
from toy.texts import description
from toy.twins import caption_of, draw_kind, is_true, objects_are_true, pair_of
from toy.world import draw, training_scene
from trainer.build import match_embedding_scale, new_toy_stage1

WEIGHTS = Path(__file__).parents[1] / "toy/weights"
PAIRS = 16                      # scenes of a step, each with its twin
MOST_TOKENS = 64                # more than any caption or description has

STEPS = 6400

# ITM learns to compare one object within 400 steps; from captions of four objects and twelve
# details, one of them wrong, its loss was still .36 after 2,600. So most captions say first where
# one object is, and then, as toy/twins.py has it, where all are.
ONE_OBJECT_STEPS = 400
MOST_OBJECTS = 4                # of a scene


def kind_of(step):
    """What the captions of a step say."""
    if step < ONE_OBJECT_STEPS and step % 4:
        return "one"
    return draw_kind(random.Random(f"kind:{step}"))


def wrong_objects(fact, scene):
    """MOST_OBJECTS numbers: 1 where the fact's n-th object is not in the scene as it says, 0 where
    it is, -1 where it names none. Of a fact about one object all are equal."""
    found = [float(not right) for right in objects_are_true(fact, scene)]
    if fact[0] == "one":
        found *= MOST_OBJECTS
    return found + [-1.] * (MOST_OBJECTS - len(found))


class Batches:
    """step -> [one micro-batch]: a dict of tensors of 2 * PAIRS pictures and their texts.

    pixels (B, 3, S, S); caption, told: (ids, mask) (B, T) of the captions, which ITC and ITM
    compare, and of what ITG writes, descriptions and captions in turn; is_true (B, B): text k is
    true of picture b; wrong (B, B, MOST_OBJECTS): its n-th object is not (`wrong_objects`);
    described: (indices of PAIRS / 2 pictures, ids, labels) for the LLaMA.

    All captions of a step are of one kind: then all are about as long, and little is padded, and
    no caption is told from another by its kind."""

    def __init__(self, model, words):
        self.tokenizer, self.image_size, self.words = model.tokenizer, model.image_size, words

    def __call__(self, step):
        shown, kind = [], kind_of(step)
        for i in range(step * PAIRS, (step + 1) * PAIRS):
            shown += pair_of(training_scene(f"qformer:{i}"), i, kind)
        texts = [caption_of(fact) for _, fact in shown]
        told = texts
        if step % 2:
            told = [description(scene) for scene, _ in shown]
        pixels = [data.preprocess(draw(scene), self.image_size, "squash") for scene, _ in shown]
        truth = [[is_true(fact, scene) for _, fact in shown] for scene, _ in shown]
        wrong = [[wrong_objects(fact, scene) for _, fact in shown] for scene, _ in shown]
        return [{"pixels": torch.cat(pixels),
                 "caption": self.tokenizer.encode(texts, MOST_TOKENS),
                 "told": self.tokenizer.encode(told, MOST_TOKENS),
                 "is_true": torch.tensor(truth), "wrong": torch.tensor(wrong),
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
    """The five losses of one micro-batch. `proj` and `object_head` are thrown away when training
    ends: what comes after has a projection of its own, as in MiniGPT-4."""

    def __init__(self, model, llm):
        super().__init__()
        self.model, self.llm = model, llm.requires_grad_(False)
        self.proj = nn.Linear(model.qformer.config.width, llm.config.width)
        match_embedding_scale(self.proj, self.proj, model.qformer.config.width, llm)
        self.object_head = nn.Linear(model.qformer.config.width, 1)

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
            out |= self.matching_losses(features, ids, mask, negatives, micro["wrong"])
        return out

    def matching_losses(self, features, ids, mask, negatives, wrong):
        """itm as in `matching_loss` of qformer.py, and object from the same pass.
        features (B, 1+P, Cv); ids, mask (B, T); negatives (2, B); wrong (B, B, MOST_OBJECTS)."""
        model, own = self.model, torch.arange(len(ids))
        pictures, texts = torch.cat((own, negatives[0], own)), torch.cat((own, own, negatives[1]))
        x = model.qformer(features[pictures], ids[texts], itm, mask[texts])     # (3 B, Q+T, C)
        x = x[:, :model.qformer.config.num_queries]                             # (3 B, Q, C)
        logits = self.object_head(x).view(len(x), MOST_OBJECTS, -1)             # a quarter each
        label = wrong[pictures, texts][..., None].expand_as(logits)             # (3 B, 4, Q / 4)
        losses = F.binary_cross_entropy_with_logits(logits.float(), label, reduction="none")
        named = label >= 0
        return {"itm": itm_loss(model.itm_head(x).mean(1), negatives),
                "object": (losses * named).sum() / named.sum().clamp(min=1)}

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

    def lr_scale(step):         # 50 steps of warm-up, then a cosine to 0
        return min(1, (step + 1) / 50) * (1 + math.cos(math.pi * step / STEPS)) / 2
    trained = {name: p for name, p in lessons.named_parameters() if p.requires_grad}
    return dict(model=lessons, optimizers=muon(trained, .008, 1e-3, decay=.01),
                steps=STEPS, batches=Batches(model, words), loss=lessons, lr_scale=lr_scale,
                save_model=save_model, clip=1.0, batch=2 * PAIRS)
