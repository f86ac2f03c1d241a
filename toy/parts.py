"""TODO"""

import json
import math
import random
import shutil

import torch

import data
from clip import CLIP, contrastive_loss, filip_scores
from clip import Config as TowerConfig
from formats.bert import toy_clip_tokenizer
from formats.export import save_tokenizer
from kernels import linear_cross_entropy
from llama import Config as LlamaConfig
from llama import Llama
from toy import texts as toy_texts
from toy import world as toy_world
from toy.induction import init_induction_heads
from toy.texts import DESCRIBE, description, dialogue, is_true_of, notes, web_caption, word_picture
from toy.world import (
    BACKGROUNDS,
    COLOURS,
    draw,
    hard_negative_scene,
    make_scene,
    NUMBERS,
    SHAPES,
    SIDE,
)


def muon(model, lr, rest_lr, betas):
    """[Muon] for the blocks' matrices, AdamW for the rest: a fifth of AdamW's time on the toy."""
    blocks = {id(p) for n, p in model.named_parameters() if p.dim() == 2 and "blocks" in n}
    parts = [[p for p in model.parameters() if (id(p) in blocks) == wanted]
             for wanted in (True, False)]
    return [torch.optim.Muon(parts[0], lr, weight_decay=.01, momentum=.95),
            torch.optim.AdamW(parts[1], rest_lr, betas, weight_decay=0, fused=True)]


def clip_tokenizer(folder):
    """A word-level tokenizer.json of the toy captions; the end token has the largest id."""
    from tokenizers import models, normalizers, pre_tokenizers, processors, Tokenizer
    texts = ["object photo picture image of the with"]
    for i in range(2000):
        scene = make_scene(i)
        texts += toy_texts.captions(scene) + [f"a {scene.background} background"]
    words = sorted({w for t in texts for w in t.lower().replace(",", " ,").split()})
    ids = {w: i for i, w in enumerate(["<pad>", "<unk>", *words, "<start>", "<end>"])}
    made = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[(w, ids[w]) for w in ("<start>", "<end>")])
    made.save(str(folder / "tokenizer.json"))
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


def clip_job(out):
    """The eye: phrases to patches, and captions to the class token at a quarter of the weight.

    Pictures come with a twin that differs in one attribute of every object, so that neither
    colours nor places alone can tell which phrase is whose."""
    vocab = clip_tokenizer(out)
    ids_of = toy_clip_tokenizer(out)
    torch.manual_seed(0)
    model = CLIP(TowerConfig(128, 5, 4, 512, image_size=SIDE, patch_size=8),
                 TowerConfig(128, 2, 4, 512, vocab=vocab, context=64, eos_id=vocab - 1), 128)
    steps, pairs = 2400, 64

    def batch(step):
        scenes = []
        for i in range(step * pairs, (step + 1) * pairs):
            scenes += [make_scene(i), hard_negative_scene(make_scene(i), i)]
        dice, facts, links = random.Random(f"phrases:{step}"), {}, []
        for b, scene in enumerate(scenes):
            for text, fact in toy_texts.phrases(scene, dice):
                facts.setdefault(text, (len(facts), fact))
                links.append((b, facts[text][0]))
        truth = torch.tensor([[is_true_of(f, s) for _, f in facts.values()] for s in scenes])
        captions = [toy_texts.captions(s)[0] for s in scenes]
        same = torch.tensor([[a == b for b in captions] for a in captions])
        pixels = torch.cat([data.preprocess(draw(s), SIDE, "square") for s in scenes])
        return [(pixels, ids_of(facts), truth, torch.tensor(links), ids_of(captions), same)]

    def loss(micro):
        pixels, phrases, truth, links, captions, same = micro
        seen, scale = model.patches(pixels), model.logit_scale.clamp(max=math.log(100)).exp()
        fine = contrastive_loss(filip_scores(seen[:, 1:], model.encode_text(phrases)) * scale,
                                truth, links)
        whole = contrastive_loss(seen[:, 0] @ model.encode_text(captions).T * scale, same,
                                 torch.arange(len(pixels))[:, None].expand(-1, 2))
        return fine + .25 * whole

    def finish(folder):
        normalize_output_scale(model.vision, batch(0)[0][0])
        model.save_pretrained(folder)
        shutil.copy(out / "tokenizer.json", folder)

    def factor(step):
        return min(1, (step + 1) / 50) * (1 + math.cos(math.pi * step / steps)) / 2
    return dict(model=model, optimizers=muon(model, .02, 2e-3, (.9, .98)), steps=steps, batches=batch,
                loss=loss, factor=factor, finish=finish, batch=2 * pairs)


def llama_tokenizer(folder):
    """tokenizer.json and its config in LLaMA's layout: BPE, bytes for what it has never seen.

    Merges are learned inside words, so every common word of the toy world is one token."""
    from tokenizers import models, pre_tokenizers, Tokenizer, trainers
    texts = [data.prompt([{"from": "human", "value": "hi"}], "v1"),
             "Yes. No. yes no none No The notes: . , ; ? ! ' object shape thing"]
    for words in (COLOURS, SHAPES, toy_world.SIZES, BACKGROUNDS, NUMBERS):
        texts += [t for w in words for t in (w, w.capitalize())]
    for i in range(4000):
        scene, dice = make_scene(i), random.Random(i)
        texts += toy_texts.captions(scene) + [web_caption(scene, dice), notes(scene, dice)]
        texts += [t for pair in dialogue(scene, dice, 3) for t in pair]
        texts.append(dice.choice(DESCRIBE))
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Metaspace(prepend_scheme="first", split=True),
        pre_tokenizers.Punctuation(), pre_tokenizers.Digits(individual_digits=True)])
    made.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=2048, min_frequency=1, show_progress=False,
        special_tokens=["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)]))
    spec = json.loads(made.to_str())
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
    """The language model: a scene told in words, then questions about it, or another telling.

    Answers count fully, everything else a twentieth: what notes say cannot be predicted.

    After the first steps half of the scenes are told in *blends*: "large red star top left" is
    one vector, the sum of its words' embeddings, and 64 of them are laid out as patches are. A
    million weights grow circuits that count on one word a place, and no bridge found a way into
    them (README); a model of Vicuna's size, which LLaVA's bridge can speak to, seems not to need
    this lesson."""
    llama_tokenizer(out)
    words = data.Tokenizer(out)
    torch.manual_seed(0)
    model = Llama(LlamaConfig(-(-len(words) // 64) * 64, 128, 5, 4, 4, 352, 1e-5, 1e5, 1024))
    init_induction_heads(model)
    steps, size, pool, blends_from = 4500, 16, [], 200

    def row(i):
        scene, dice = make_scene(i), random.Random(f"row:{i}")
        told = notes(scene, dice)
        if dice.random() < .12:
            second = dice.choice(toy_texts.captions(scene) + [description(scene)] * 3)
            first, second = words.encode(told + "\n"), words.encode(second + "\n", bos=False)
            return first + second, [.05] * len(first) + [1.] * len(second)
        talk = []
        for question, answer in dialogue(scene, dice, 8):
            talk += [{"from": "human", "value": question if talk else f"{told}\n{question}"},
                     {"from": "gpt", "value": answer}]
        ids, labels = data.encode(talk, "v1", words, has_image=False)
        return ids, [.05 if x == data.IGNORE else 1. for x in labels]

    def blended(i):
        """A row whose ids hold, for each blend, the tuple of its words' ids; nothing is predicted
        of blends."""
        scene, dice = make_scene(i), random.Random(f"blend:{i}")
        told = [tuple(words.encode(text, bos=False)) for text in word_picture(scene, dice)]
        if dice.random() < .35:
            text = dice.choice([description(scene)] * 5 + toy_texts.captions(scene))
            talk, template = [("<image>", text)], "plain"
        else:
            talk, template = dialogue(scene, dice, 7), "v1"
            talk[0] = (f"<image>\n{talk[0][0]}", talk[0][1])
        turns = [{"from": who, "value": text} for pair in talk
                 for who, text in zip(("human", "gpt"), pair)]
        ids, labels = data.encode(turns, template, words)
        at = ids.index(data.IMAGE)
        weights = [.05 if x == data.IGNORE else 1. for x in labels]
        return ids[:at] + told + ids[at + 1:], weights[:at] + [0.] * len(told) + weights[at + 1:]

    def batch(step):
        # rows of like length side by side: four batches' worth are sorted, then dealt out
        at, part = divmod(step, 4)
        if not pool or pool[0] != at:
            first = 4 * at * size
            made = [blended(i) if step >= blends_from and i % 2 else row(i)
                    for i in range(first, first + 4 * size)]
            pool[:] = [at, sorted(made, key=lambda r: len(r[0]))]
        rows = pool[1][part * size:(part + 1) * size]
        length = -(-max(len(r[0]) for r in rows) // 32) * 32 + 1   # few lengths: few compilations
        five = lambda x: [*x, -1, -1, -1, -1][:5] if type(x) is tuple else [x, -1, -1, -1, -1]
        blank = [[-1] * 5]
        ids = torch.tensor([[five(x) for x in a] + blank * (length - len(a)) for a, _ in rows])
        weights = torch.tensor([b + [0.] * (length - len(b)) for _, b in rows])
        return [(ids, weights)]

    torch._dynamo.config.recompile_limit = 32           # one compilation a length; 8 allowed else

    @torch.compile(dynamic=False)           # 40 s to start, twice as fast after
    def loss(micro):
        ids, weights = micro                    # (B, T, 5): up to 5 words a place, -1 for none
        there, weights = (ids >= 0)[:, :-1, :, None], weights[:, 1:]
        x = (model.embed(ids[:, :-1].clamp(min=0)) * there).sum(2) / there.sum(2).clamp(min=1) ** .5
        return linear_cross_entropy(
            model.hidden(x).flatten(0, 1), model.head.weight, ids[:, 1:, 0].clamp(min=0).flatten(),
            (weights / weights.sum()).flatten())

    def finish(folder):
        model.save_pretrained(folder)
        save_tokenizer(words, folder)

    def factor(step):                       # constant, then straight to 0 over the last 64 %
        return min(1, (step + 1) / 50) * min(1, (steps - step) / (.64 * steps))
    return dict(model=model, optimizers=muon(model, .015, 2e-3, (.9, .95)), steps=steps, batches=batch,
                loss=loss, factor=factor, finish=finish, clip=1.0, batch=size)
