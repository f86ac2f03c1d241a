"""toy.parts: the toy's own CLIP and LLaMA, trained from nothing on the toy world (stage 0).

    python train.py --stage 0 [--part clip]       writes runs/toy/stage0/, shipped as toy/weights/

    clip_job    phrases <-> patches, captions <-> class token: contrastive, fine and whole
    llama_job   a scene in words, then questions about it: next-token prediction

Both return the arguments of train.TrainJob: this file only says what to train and on what.

[CLIP] 2103.00020.  [FILIP] 2111.07783, late interaction.  [Muon] kellerjordan.github.io/posts/muon.

Next: train.py, the loop that runs these jobs.
"""
import json
import math
import random
import shutil
from dataclasses import replace

import torch

import data
from clip import CLIP, contrastive_loss, filip_scores
from clip import Config as TowerConfig
from formats.bert import toy_clip_tokenizer
from formats.export import save_tokenizer
from kernels import linear_cross_entropy
from llama import Config as LlamaConfig
from llama import Llama
from toy.augment import draw_augmented, recolour
from toy.induction import init_induction_heads
from toy.phrases import is_true_of, notes, phrases
from toy.rows import notes_row, stack_rows, word_picture_row
from toy.texts import (
    article,
    captions,
    DESCRIBE,
    dialogue,
    KIND_WEIGHTS,
    listed,
    web_caption,
)
from toy.world import (
    BACKGROUNDS,
    COLOURS,
    draw,
    hard_negative_scene,
    lone_scene,
    make_scene,
    NUMBERS,
    SHAPES,
    SIDE,
    SIZES,
)


def muon(trained, lr, rest_lr, betas=(.9, .95), decay=.5):
    """[Muon] for the hidden layers' matrices, AdamW for the rest: a fifth of AdamW's steps on the
    toy. trained: {name: parameter}; lr and weight decay are the matrices', rest_lr the rest's.

    The decay matters for a projector: with little, it fits the colour-shape pairs that it is shown,
    and reads others wrongly (docs/results.md)."""
    matrices, rest = [], []
    for name, p in trained.items():
        is_hidden = "blocks" in name or name.endswith(("first.weight", "second.weight"))
        (matrices if p.dim() == 2 and is_hidden else rest).append(p)
    found = []
    if matrices:
        found.append(torch.optim.Muon(matrices, lr, weight_decay=decay, momentum=.95))
    if rest:
        found.append(torch.optim.AdamW(rest, rest_lr, betas, weight_decay=0, fused=True))
    return found


# ----------------------------------------------------------------------------------- CLIP

AUGMENTED = .4                  # share of the pictures that are not drawn by toy.world.draw
UNNAMED = .3                    # share of those whose colours have no name
EASY_STEPS = 500                # without either; then as many steps until there are that many. With
                                # all of them from the first step shapes were learned far later
FIRST_STEPS = 2800              # a whole schedule without lone objects. With a quarter of them from
                                # the first step the loss was 2.4 at step 1,000; without it 1.0
LONE_STEPS = 800                # a second, lower schedule: every fourth pair is a lone object

def clip_tokenizer(folder):
    """Write a word-level tokenizer.json of the toy captions; returns the number of its tokens.

    The end token has the largest id: CLIP's text tower finds it by that."""
    from tokenizers import models, normalizers, pre_tokenizers, processors, Tokenizer
    texts = ["object photo picture image of the with"]
    for i in range(2000):
        scene = make_scene(i)
        texts += captions(scene) + [f"a {scene.background} background"]
    words = sorted({w for t in texts for w in t.lower().replace(",", " ,").split()})
    ids = {w: i for i, w in enumerate(["<pad>", "<unk>", *words, "<start>", "<end>"])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[(w, ids[w]) for w in ("<start>", "<end>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    return len(ids)


@torch.no_grad()
def normalize_output_scale(vision, pixels):
    """Scale the residual stream so that the second-last block's output has unit variance.

    vision: clip.ViT. Every block reads the stream through a norm, so scaling everything that writes
    into it changes no answer. Muon leaves outputs 26 times larger than the toy's embeddings; inputs
    that large drown what each LLaMA block adds."""
    factor = 1 / vision(pixels).std()
    layers = [vision.norm_pre]
    for block in vision.blocks:
        layers += [block.out, block.down]
    for layer in layers:
        layer.weight.mul_(factor)
        layer.bias.mul_(factor)


def clip_pictures(step, pairs):
    """[(scene, picture)] of one step: each scene is followed by its hard negative.

    The hard negative differs in one attribute of each object, so that colours or places alone
    cannot tell which phrase belongs to which picture. Some are drawn as others would draw them."""
    found, rng = [], random.Random(f"wild:{step}")
    ramp = min(1, max(0, (step - EASY_STEPS) / EASY_STEPS))
    for i in range(step * pairs, (step + 1) * pairs):
        is_lone = step >= FIRST_STEPS and i % 4 == 3
        scene = lone_scene(i) if is_lone else make_scene(i)
        twins = [scene, hard_negative_scene(scene, i)]
        if rng.random() < UNNAMED * ramp:
            twins = [recolour(scene, i) for scene in twins]
        augmented = rng.random() < AUGMENTED * ramp
        for scene in twins:
            picture, kept = draw_augmented(scene, rng) if augmented else (draw(scene), True)
            if not kept:
                scene = replace(scene, background="")
            found.append((scene, picture))
    return found


def clip_caption(scene):
    """The first of `captions`; shapes alone where colours have no name."""
    if scene.things[0].colour:
        return captions(scene)[0]
    return listed([article(t.shape) for t in scene.things])


def clip_batch(step, pairs, encode):
    """One micro-batch: pixels, phrases and which are true of which picture, captions the same way.
    """
    shown = clip_pictures(step, pairs)
    scenes = [scene for scene, _ in shown]
    rng, facts, links = random.Random(f"phrases:{step}"), {}, []
    for b, scene in enumerate(scenes):
        for text, fact in phrases(scene, rng):
            facts.setdefault(text, (len(facts), fact))      # {phrase: (its number, its fact)}
            links.append((b, facts[text][0]))
    is_true = torch.tensor([[is_true_of(fact, s) for _, fact in facts.values()] for s in scenes])
    first = [clip_caption(s) for s in scenes]
    same = torch.tensor([[a == b for b in first] for a in first])
    pixels = torch.cat([data.preprocess(picture, SIDE, "square") for _, picture in shown])
    return pixels, encode(facts), is_true, torch.tensor(links), encode(first), same


def clip_job(out):
    """CLIP: phrases to patches, and captions to the class token at a quarter of the weight."""
    vocab = clip_tokenizer(out)
    encode = toy_clip_tokenizer(out)
    torch.manual_seed(0)
    model = CLIP(TowerConfig(128, 5, 4, 512, image_size=SIDE, patch_size=8),
                 TowerConfig(128, 2, 4, 512, vocab=vocab, context=64, eos_id=vocab - 1), 128)
    pairs = 64
    patches = torch.compile(model.patches, dynamic=False)

    def batch(step):
        return [clip_batch(step, pairs, encode)]

    def loss(micro):
        pixels, texts, is_true, links, first, same = micro
        # on a CPU with bf16 instructions a step takes two thirds of the time
        with torch.autocast("cpu", torch.bfloat16):
            image, phrase = patches(pixels), model.encode_text(texts)
            caption = model.encode_text(first)
        image, phrase, caption = image.float(), phrase.float(), caption.float()
        scale = model.logit_scale.clamp(max=math.log(100)).exp()
        fine = contrastive_loss(filip_scores(image[:, 1:], phrase) * scale, is_true, links)
        whole = contrastive_loss(image[:, 0] @ caption.T * scale, same,
                                 torch.arange(len(pixels))[:, None].expand(-1, 2))
        return {"loss": fine + .25 * whole}

    def save_model(folder):
        normalize_output_scale(model.vision, batch(0)[0][0])
        model.save_pretrained(folder)
        shutil.copy(out / "tokenizer.json", folder)

    def lr_scale(step):         # twice 50 steps of warm-up, then a cosine to 0; at last lower
        peak, steps = 1, FIRST_STEPS
        if step >= FIRST_STEPS:
            peak, steps, step = .3, LONE_STEPS, step - FIRST_STEPS
        return peak * min(1, (step + 1) / 50) * (1 + math.cos(math.pi * step / steps)) / 2
    optimizers = muon(dict(model.named_parameters()), .02, 2e-3, (.9, .98), decay=.01)
    return dict(model=model, optimizers=optimizers, steps=FIRST_STEPS + LONE_STEPS, batches=batch,
                loss=loss, lr_scale=lr_scale, save_model=save_model, batch=2 * pairs)


# ----------------------------------------------------------------------------------- LLaMA

PICTURES = 5                    # of 8 rows are word pictures
WORD_STEPS = 6000               # a whole schedule, then a second, lower one, which asks more often
SHARPER_STEPS = 1500            # for what is learned last: to compare two words, and to find an
                                # object by colour and shape at once
SHARPER = (6, 6, 10, 16, 4, 8, 20, 20, 26, 4)               # how often each of KINDS is asked then

def tokenizer_texts():
    """The texts whose words become tokens."""
    texts = [data.prompt([{"from": "human", "value": "hi"}], "v1"),
             "Yes. No. yes no none No The notes: . , ; ? ! ' object shape thing",
             data.prompt([{"from": "human", "value": "<image>"}], "minigpt4")]
    for words in (COLOURS, SHAPES, SIZES, BACKGROUNDS, NUMBERS):
        for word in words:
            texts += [word, word.capitalize()]
    for i in range(4000):
        scene, rng = make_scene(i), random.Random(i)
        texts += captions(scene) + [web_caption(scene, rng), notes(scene, rng)]
        for pair in dialogue(scene, rng, 3):
            texts += pair
        texts.append(rng.choice(DESCRIBE))
    return texts


def llama_tokenizer(folder):
    """tokenizer.json and its config in LLaMA's layout: BPE, and bytes for unknown characters.

    Merges are learned inside words, so every common word of the toy world is one token. The
    file that is written has LLaMA's own pre-tokenizer instead, which does not split."""
    from tokenizers import models, pre_tokenizers, Tokenizer, trainers
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Metaspace(prepend_scheme="first", split=True),
        pre_tokenizers.Punctuation(), pre_tokenizers.Digits(individual_digits=True)])
    tokenizer.train_from_iterator(tokenizer_texts(), trainers.BpeTrainer(
        vocab_size=2048, min_frequency=1, show_progress=False,
        special_tokens=["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)]))
    spec = json.loads(tokenizer.to_str())
    one = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    two = [{"SpecialToken": {"id": "<s>", "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    spec |= {"added_tokens": spec["added_tokens"][:3], "normalizer": None,
             "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first",
                               "split": False},
             "post_processor": {
                 "type": "TemplateProcessing", "single": one, "pair": one + two,
                 "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
             "decoder": {"type": "Sequence", "decoders": [
                 {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                 {"type": "ByteFallback"}, {"type": "Fuse"},
                 {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}}
    (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "legacy": False, "add_bos_token": True,
        "add_eos_token": False, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "pad_token": "<unk>", "model_max_length": 1024, "padding_side": "right",
        "clean_up_tokenization_spaces": False}, indent=1) + "\n")


def llama_job(out):
    """The language model: it reads a scene in words and answers questions about it.

    From step `blends_from` on, PICTURES of 8 scenes are word pictures. A 1M-parameter model trained
    on text alone relies on one word per position, and no projector we trained could feed it
    pictures. Vicuna-sized models do not need this step."""
    llama_tokenizer(out)
    words = data.Tokenizer(out)
    torch.manual_seed(0)
    vocab = math.ceil(len(words) / 64) * 64
    model = Llama(LlamaConfig(vocab, 128, 5, 4, 4, 352, 1e-5, 1e5, 1024))
    init_induction_heads(model)
    steps, size, blends_from = WORD_STEPS + SHARPER_STEPS, 16, 200
    pool = []                               # [number of a group, its rows sorted by length]

    def batch(step):
        # rows of like length side by side: a group of four batches is sorted, then cut in four
        group, part = divmod(step, 4)
        if not pool or pool[0] != group:
            first, rows = 4 * group * size, []
            weights = KIND_WEIGHTS if step < WORD_STEPS else SHARPER
            for i in range(first, first + 4 * size):
                shown = step >= blends_from and i * PICTURES % 8 < PICTURES
                make_row = word_picture_row if shown else notes_row
                rows.append(make_row(i, words, weights))
            pool[:] = [group, sorted(rows, key=lambda row: len(row[0]))]
        return [stack_rows(pool[1][part * size:(part + 1) * size])]

    torch._dynamo.config.recompile_limit = 32           # one compilation a length; 8 allowed else

    @torch.compile(dynamic=False)           # 40 s to start, twice as fast after
    def compiled_loss(ids, weights):
        present, weights = (ids >= 0)[:, :-1, :, None], weights[:, 1:]
        embeds = model.embed(ids[:, :-1].clamp(min=0)) * present        # (B, T-1, 5, C)
        # a sum of n random vectors is sqrt(n) long: divided by that, it is as long as one word's
        x = embeds.sum(2) / present.sum(2).clamp(min=1) ** .5           # (B, T-1, C)
        value = linear_cross_entropy(
            model.hidden(x).flatten(0, 1), model.head.weight, ids[:, 1:, 0].clamp(min=0).flatten(),
            (weights / weights.sum()).flatten())
        return value

    def loss(micro):
        with torch.autocast("cpu", torch.bfloat16):     # two thirds of the time, as for CLIP
            return {"loss": compiled_loss(*micro)}      # of ids (B, T, 5), weights (B, T)

    def save_model(folder):
        model.save_pretrained(folder)
        save_tokenizer(words, folder)

    def lr_scale(step):             # twice: constant, then straight to 0 over the last 64 %
        peak, steps = 1, WORD_STEPS
        if step >= WORD_STEPS:
            peak, steps, step = .5, SHARPER_STEPS, step - WORD_STEPS
        return peak * min(1, (step + 1) / 50) * min(1, (steps - step) / (.64 * steps))
    optimizers = muon(dict(model.named_parameters()), .015, 2e-3, decay=.01)
    return dict(model=model, optimizers=optimizers, steps=steps, batches=batch, loss=loss,
                lr_scale=lr_scale, save_model=save_model, clip=1.0, batch=size)
