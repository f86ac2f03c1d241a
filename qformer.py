"""qformer.py: ask a picture 32 learned questions, and read the answers as 32 vectors.

    queries (Q, C) learned ─┐                       pixels ─> eye ─> ln_vision ─> features (P, Cv)
    words   (T, C) ids ─────┴─ norm ─> depth blocks, of BERT's kind, norms behind:
                                                                             queries   words
        attention    all of the row, under one of three masks                  ×         ×
        cross        to the features, in every second block                    ×
        MLP          one for the queries, another for the words                ×         ×

What the queries bring back has the same size for every picture: Q vectors, whatever P is. Trained
in two stages [BLIP-2] 2301.12597: first with captions, under three masks and three losses (here),
then in front of a language model (projector.py).

Row: who looks. Column: what is seen. Q = 2 queries, then T = 4 words:

    itc  # # . . . .      itm  # # # # # #      itg  # # . . . .
         # # . . . .           # # # # # #           # # . . . .
         . . # # # #           # # # # # #           # # # . . .
         . . # # # #           # # # # # #           # # # # . .
         . . # # # #           # # # # # #           # # # # # .
         . . # # # #           # # # # # #           # # # # # #

    itc  two towers in one: picture and words know nothing of each other. Contrast in the batch
    itm  one reader of both. Does this caption belong to this picture?
    itg  words see the queries and the past, the queries see no word: write the caption. What the
         queries did not bring back, nobody can write

Quirks that load without an error and are wrong when missed: words count positions from 0, though
queries stand before them; queries have no position, but pass the embedding's norm all the same.
Checked against: transformers' Blip2ForImageTextRetrieval and InstructBLIP (tests/test_qformer.py).
Left out: dropout (officially 0.1, a regulariser: without it a step is a function of its inputs, so
that resuming is exact and activations can be made again); training the eye in the first stage.

Letters: B batch, T words, Q queries, P patches, C width, H heads, E shared width, V vocabulary,
N pairs of all ranks.
Alone: `python qformer.py photo.jpg "a caption" "another"` scores captions; without arguments it
draws the masks.   Next: projector.py, which hands the answers to a language model.
"""

import argparse
import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import data
from clip import block_names, LayerNorm, prefixed, ViT
from clip import Config as ViTConfig
from formats import configs
from formats.bert import BertTokenizer
from formats.checkpoints import (
    dtype_name,
    export,
    load_into,
    resolve,
    save_weights,
)
from formats.errors import exit_status, UsageError
from formats.processors import Processor
from formats.strict_json import read_config
from formats.unused import POSITIONS, tied_decoder
from kernels import attention, full, gelu, linear_cross_entropy
from kernels.attention import visible

# ------------------------------------------------------------------------------------ masks

def itc(q, k, n):
    return (q < n) == (k < n)


def itc_span(lo, hi, n, end):
    first, last = n if lo >= n else 0, n if hi <= n else end
    return first, last, first, (last if (lo >= n) | (hi <= n) else 0)


def itm(q, k, n):
    return (q >= 0) & (k >= 0)


def itm_span(lo, hi, n, end):
    return 0, end, 0, end


def itg(q, k, n):
    return (k < n) | ((q >= n) & (k <= q))


def itg_keys(lo, hi, n, end):
    return 0, (hi if hi > n else n), 0, (lo + 1 if lo >= n else n)


def itg_queries(lo, hi, n, end):
    return (0 if lo < n else lo), end, (0 if hi <= n else hi - 1), end


itc.keys = itc.queries = itc_span
itm.keys = itm.queries = itm_span
itg.keys, itg.queries = itg_keys, itg_queries


# ------------------------------------------------------------------------------- the Q-Former

@dataclass(frozen=True)
class Config:
    """Sizes. Defaults are BLIP-2's, which are BERT-base's."""
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp: int = 3072
    eps: float = 1e-12
    num_queries: int = 32
    vision_width: int = 1408              # width of the features
    vocab: int = 30523              # BERT's 30,522 and [DEC]; 0: no words, only queries
    context: int = 512              # positions of words
    cross_attention_freq: int = 2                  # cross-attention in blocks 0, every, 2 every ...


class Attention(nn.Module):
    """norm(x + attention(x, source)): of a row to itself, or of the queries to the features."""

    def __init__(self, c, source):
        super().__init__()
        self.heads = c.heads
        self.q = nn.Linear(c.width, c.width)
        self.kv = nn.Linear(source, 2 * c.width)
        self.out = nn.Linear(c.width, c.width)
        self.norm = LayerNorm(c.width, c.eps)

    def forward(self, x, source, allow=full, n=0, attention_mask=None, past=None):
        """x (B, T, C), source (B, S, C'), past: k and v that stand before the source's own.
        Returns (B, T, C), and k and v (B, S, H, D) for a later call's `past`."""
        B, T, C = x.shape
        q = self.q(x).view(B, T, self.heads, C // self.heads)
        k, v = self.kv(source).view(B, -1, 2, self.heads, C // self.heads).unbind(2)
        start = 0
        if past is not None:
            start = past[0].shape[1]
            k, v = (torch.cat((old, new), 1) for old, new in zip(past, (k, v)))
        y = attention(q, k, v, allow, n, start, attention_mask)
        return self.norm(x + self.out(y.reshape(B, T, C))), (k, v)


class FeedForward(nn.Module):
    """norm(x + MLP(x))."""

    def __init__(self, c):
        super().__init__()
        self.up = nn.Linear(c.width, c.mlp)
        self.down = nn.Linear(c.mlp, c.width)
        self.norm = LayerNorm(c.width, c.eps)

    def forward(self, x):
        return self.norm(x + self.down(gelu(self.up(x))))


class Block(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.attention = Attention(c, c.width)
        self.cross = Attention(c, c.vision_width) if layer % c.cross_attention_freq == 0 else None
        self.mlp = FeedForward(c)                                       # of the queries
        self.words_mlp = FeedForward(c) if c.vocab else None

    def forward(self, x, n, features, allow, attention_mask, past):
        """x (B, n+T, C), its first n the queries; n = 0 with `past`, the queries' k and v.
        Returns x, and k and v of its self-attention."""
        ahead = n if past is None else past[0].shape[1]
        x, kv = self.attention(x, x, allow, ahead, attention_mask, past)
        asks, words = x[:, :n], x[:, n:]
        if n:
            if self.cross is not None:
                asks, _ = self.cross(asks, features)
            asks = self.mlp(asks)
        if words.shape[1]:
            words = self.words_mlp(words)
        return torch.cat((asks, words), 1), kv


def block_table(at, inner):
    """{ours: theirs} of one block; attention is called `inner` inside of theirs."""
    parts = {f"{ours}.{part}": f"{theirs[i]}.{name}"
             for ours, theirs in (("mlp", ("intermediate_query", "output_query")),
                                  ("words_mlp", ("intermediate", "output")))
             for part, i, name in (("up", 0, "dense"), ("down", 1, "dense"),
                                   ("norm", 1, "LayerNorm"))}
    for ours, theirs in (("attention", "attention"), ("cross", "crossattention")):
        parts |= {f"{ours}.q": f"{theirs}.{inner}.query", f"{ours}.out": f"{theirs}.output.dense",
                  f"{ours}.kv": (f"{theirs}.{inner}.key", f"{theirs}.{inner}.value"),
                  f"{ours}.norm": f"{theirs}.output.LayerNorm"}
    return block_names(at, **parts)


def layers(**names):
    """{ours: theirs} of layers with a weight and a bias."""
    return {f"{ours}.{kind}": f"{theirs}.{kind}" for kind in ("weight", "bias")
            for ours, theirs in names.items()}


def table(blocks, norm, words):
    return {"query_tokens": "query_tokens", **blocks, **layers(norm=norm),
            "word.weight": f"{words}.word_embeddings.weight",
            "position.weight": f"{words}.position_embeddings.weight"}


class QFormer(nn.Module):
    # quirk: BLIP-2 and InstructBLIP hold the same embeddings under different names
    NAMES = table(block_table("qformer.encoder.layer.{}.", "attention"),
                  "qformer.layernorm", "embeddings")
    INSTRUCT_NAMES = table(block_table("qformer.encoder.layer.{}.", "attention"),
                           "qformer.embeddings.layernorm", "qformer.embeddings")
    LAVIS_NAMES = table(block_table("Qformer.bert.encoder.layer.{}.", "self"),
                        "Qformer.bert.embeddings.LayerNorm", "Qformer.bert.embeddings")
    IGNORE = {**POSITIONS, r"Qformer\.cls\..*": "the head of the captions; Retriever has it",
              r"(?!Qformer\.|qformer\.|embeddings\.|query_tokens).*": "not of the Q-Former"}
    IGNORE_WORDS = {r".*encoder\.layer\.\d+\.(intermediate|output)\..*|.*(word|position)_emb.*":
                    "the words' part, which a language model in front does without"}

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        # the 1 in front is the files'
        self.query_tokens = nn.Parameter(torch.randn(1, c.num_queries, c.width) * .02)
        if c.vocab:
            self.word = nn.Embedding(c.vocab, c.width)
            self.position = nn.Embedding(c.context, c.width)
        self.norm = LayerNorm(c.width, c.eps)
        self.blocks = nn.ModuleList(Block(c, i) for i in range(c.depth))

    @property
    def queries(self):
        """(Q, C), a view of the parameter."""
        return self.query_tokens[0]

    def forward(self, features, ids=None, allow=itm, text_mask=None, store=None, past=None):
        """Queries and words through all blocks: (B, Q+T, C), queries first.

        features (B, P, Cv), after ln_vision; None: words alone, no queries. ids (B, T); None:
        queries alone. text_mask (B, T) bool, False at padding. store: a list that receives k and v
        (B, Q, H, D) of each block's self-attention; past: such a list of a pass of queries alone,
        in front of words alone: under `itg` the words come out as if the queries were there."""
        if features is None and ids is None or past is not None and features is not None:
            raise ValueError("QFormer: give features, ids or both; with past, ids alone")
        attention_mask, rows, n = None, [], 0
        if features is not None:
            n = self.config.num_queries
            features = features.to(self.query_tokens.dtype)     # the eye may be in half precision
            rows.append(self.query_tokens.expand(len(features), -1, -1))
        if ids is not None:
            if not self.config.vocab or ids.shape[1] > self.config.context:
                raise ValueError(f"QFormer: {ids.shape[1]} words for a Q-Former with room for "
                                 f"{self.config.context if self.config.vocab else 0}")
            rows.append(self.word(ids) + self.position.weight[:ids.shape[1]])
            if text_mask is not None:
                ahead = n if past is None else past[0][0].shape[1]
                attention_mask = F.pad(text_mask, (ahead, 0), value=True)
        x = self.norm(torch.cat(rows, 1))
        for i, block in enumerate(self.blocks):
            x, kv = block(x, n, features, allow, attention_mask, None if past is None else past[i])
            if store is not None:
                store.append(kv)
        return x

    def drop_text_branch(self):
        """Drop what only words use, for a life in front of a language model. Returns self."""
        if self.config.vocab:
            self.config = replace(self.config, vocab=0)
            del self.word, self.position
            for block in self.blocks:
                block.words_mlp = None
        return self

    @classmethod
    def spelling(cls, weights):
        """The weight table in whose names a file is written."""
        if any(k.startswith("Qformer.bert.") for k in weights):
            return cls.LAVIS_NAMES
        instruct = "qformer.embeddings.layernorm.weight" in weights
        return cls.INSTRUCT_NAMES if instruct else cls.NAMES

    @classmethod
    def from_pretrained(cls, folder, dtype=None, words=True):
        """Out of a BLIP-2 (either kind), an InstructBLIP or a LAVIS file with its config.json, in
        `dtype` or the file's own. words=False leaves the words' part of it where it is.

        Raises data.BadModel, data.Offline."""
        folder = resolve(folder)
        config, weights = Config(**configs.qformer(read_config(folder))), data.load_weights(folder)
        ignore = dict(cls.IGNORE)
        if not words:
            config, ignore = replace(config, vocab=0), ignore | cls.IGNORE_WORDS
        with torch.device("meta"):
            model = cls(config)
        return load_into(model, cls.spelling(weights), weights, ignore, dtype).eval()


# ------------------------------------------------------------------------------- three losses
# All are of one rank's B pairs. The N = B · ranks pairs of all stand in the order of the ranks;
# `same` (B, N) says which picture goes with which text: mine are rows, everyone's are columns.

def all_gather(x):
    """x (B, ...) of every rank -> (N, ...), without gradient, this rank's own part too; x without
    gradient where there are no ranks. B must be the same everywhere."""
    x = x.detach()
    if not (dist.is_available() and dist.is_initialized()):
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def max_query_similarity(image, text):
    """(B, Q, E) and (N, E) unit vectors -> (B, N) cosines, each of the query that fits best."""
    return torch.einsum("bqe,ne->bqn", image, text).amax(1)


def similarities(image, text, images, texts, temp):
    """Mine (B, Q, E) and (B, E), everyone's (N, Q, E) and (N, E) -> (B, N) twice: my pictures to
    all texts, my texts to all pictures; divided by the temperature, after the best is taken."""
    return max_query_similarity(image, texts) / temp, max_query_similarity(images, text).T / temp


def itc_loss(to_text, to_image, same, smoothing=.1):
    """Which text is the picture's, which picture the text's?      [BLIP-2] 3.2, with LAVIS' target

    to_text, to_image, same (B, N). Everyone's vectors carry no gradient, so pictures learn from
    to_text alone, texts from to_image. Where several columns are right, they share the target."""
    target = (1 - smoothing) * same / same.sum(1, keepdim=True) + smoothing / same.shape[1]
    return (F.cross_entropy(to_text, target) + F.cross_entropy(to_image, target)) / 2


def hard_negatives(to_text, to_image, same, seed=0, first=0):
    """Draw, for each of my texts, a wrong picture and, for each of my pictures, a wrong text.

    Likely is what is similar: softmax of a row without the right ones. The draw depends on (seed,
    index among all N pairs) alone, so neither on the number of ranks nor on what was drawn before;
    `first` is the index of my first pair. Returns columns (2, B): pictures, then texts; -1 where
    every column is right."""
    B, N = same.shape
    u = torch.rand(N, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    u = u[first:first + B].T.to(same.device, torch.float64)                    # (2, B)
    scores = torch.stack((to_image, to_text)).detach().double().masked_fill(same, -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0)              # (2, B, N); all right: NaN, so 0
    mass = weights.cumsum(-1)
    drawn = (mass <= (u * mass[..., -1])[..., None]).sum(-1)
    return drawn.masked_fill(same.all(1), -1)


def itm_loss(logits, drawn):
    """Do they belong together? logits (3 B, 2), index 1 is yes, of the pairs in this order:

        texts      mine    mine    wrong          B each
        pictures   mine    wrong   mine
        label      1       0       0              none where nothing wrong was to be had (drawn -1)
    """
    labels = torch.cat((torch.ones_like(drawn[0]), drawn.clamp(max=0).flatten()))
    return F.cross_entropy(logits, labels.where(labels >= 0, data.IGNORE))


def itg_loss(x, weight, bias, ids, mask, smoothing=.1):
    """Write the caption: x (B, T, C) at [DEC] and words, ids (B, T), mask (B, T) bool, vocabulary
    rows weight (V, C) and bias (V). Mean over all words of the batch, the closing [SEP] too."""
    labels = ids[:, 1:].where(mask[:, 1:], data.IGNORE).flatten()
    # the bias is the weight of eight more channels, of which one is 1 (eight: a GPU likes it)
    one = F.pad(torch.ones_like(x[:, 1:, :1]), (0, 7))
    x = torch.cat((x[:, :-1], one), -1).flatten(0, 1)
    return linear_cross_entropy(x, torch.cat((weight, F.pad(bias[:, None], (0, 7))), 1), labels,
                                smoothing=smoothing)


# ------------------------------------------------------------------------------ BLIP-2, stage 1

class LMHead(nn.Module):
    """BERT's word head, without its last product, which is by the word embeddings."""

    def __init__(self, c):
        super().__init__()
        self.dense = nn.Linear(c.width, c.width)
        self.norm = LayerNorm(c.width, c.eps)
        self.bias = nn.Parameter(torch.zeros(c.vocab))

    def forward(self, x):
        return self.norm(gelu(self.dense(x)))


HEAD_NAMES = {**layers(dense="transform.dense", norm="transform.LayerNorm"), "bias": "bias"}


class Blip2Stage1(nn.Module):
    """An eye, a Q-Former, and what its three losses need: BLIP-2 after its first stage.

    The eye is frozen, the norm behind it is not. words: set by from_pretrained and from_parts."""
    NAMES = {
        **prefixed(QFormer.NAMES, "qformer.", ""),
        **layers(ln_vision="vision_model.post_layernorm", visual_projection="vision_projection",
                 text_projection="text_projection", match="itm_head")}
    # what transformers has no place for
    REST_NAMES = {**prefixed(HEAD_NAMES, "head.", "Qformer.cls.predictions."), "temp": "temp"}
    LAVIS_NAMES = {
        **prefixed(ViT.LAVIS_NAMES, "vision.", ""), **prefixed(QFormer.LAVIS_NAMES, "qformer.", ""),
        **layers(ln_vision="ln_vision", visual_projection="vision_proj", text_projection="text_proj",
                 match="itm_head"), **REST_NAMES}
    IGNORE = {**POSITIONS, **tied_decoder(
        r"Qformer\.cls\.predictions\.decoder", "Qformer.bert.embeddings.word_embeddings.weight",
        "Qformer.cls.predictions.bias")}

    def __init__(self, eye, config, shared=256, eps=None):
        """eye, config: settings of ViT and QFormer; shared: E; eps: ln_vision's."""
        super().__init__()
        if config.vision_width != eye.width or not config.vocab:
            raise data.BadModel(f"a Q-Former for features {config.vision_width} wide with {config.vocab} "
                                f"words, an eye {eye.width} wide: config.json must give both one "
                                "width, and a vocabulary")
        self.vision = ViT(eye).requires_grad_(False)
        # quirk: 1e-5 in LAVIS whatever the tower has, the tower's (1e-6) in transformers
        self.ln_vision = LayerNorm(eye.width, eye.eps if eps is None else eps)
        self.qformer = QFormer(config)
        self.visual_projection = nn.Linear(config.width, shared)
        self.text_projection = nn.Linear(config.width, shared)
        self.match = nn.Linear(config.width, 2)
        self.head = LMHead(config)
        self.temp = nn.Parameter(torch.tensor(.07))     # divides, and is never clamped
        self.tokenizer = None

    @property
    def image_size(self):
        return self.vision.config.image_size

    def encode_vision(self, pixels):
        """pixels (B, 3, S, S) -> what the frozen eye says (B, P, Cv), ln_vision not yet applied."""
        with torch.no_grad():
            x = self.vision(pixels.to(self.vision.patch.dtype))
        return x.to(self.ln_vision.weight.dtype)

    def encode_image(self, features, store=None):
        """features (B, P, Cv), after ln_vision -> (B, Q, E) unit vectors."""
        return F.normalize(self.visual_projection(self.qformer(features, allow=itc, store=store)), dim=-1)

    def encode_text(self, ids, mask):
        """ids, mask (B, T) -> (B, E) unit vectors, read at [CLS]."""
        x = self.qformer(None, ids, itc, mask)
        return F.normalize(self.text_projection(x[:, 0]), dim=-1)

    def matched(self, features, ids, mask):
        """(B, 2), index 1 is yes: the mean of the queries' logits, not of their probabilities."""
        x = self.qformer(features, ids, itm, mask)
        return self.match(x[:, :self.qformer.config.num_queries]).mean(1)

    def similarity(self, pixels, ids, mask):
        """Pictures (B, 3, S, S) and texts (N, T) -> (B, N) cosines, without temperature."""
        image = self.encode_image(self.ln_vision(self.encode_vision(pixels)))
        return max_query_similarity(image, self.encode_text(ids, mask))

    def match_logit(self, pixels, ids, mask):
        """B pictures, each with its text -> (B, 2) logits of "no" and "yes"."""
        return self.matched(self.ln_vision(self.encode_vision(pixels)), ids, mask)

    def score(self, pixels, ids, mask):
        """B pictures, each with its text -> (B,): raw match logit + cosine, as published."""
        features = self.ln_vision(self.encode_vision(pixels))
        cosine = torch.einsum("bqe,be->bq", self.encode_image(features),
                              self.encode_text(ids, mask)).amax(1)
        return self.matched(features, ids, mask)[:, 1] + cosine

    def losses(self, pixels, ids, mask, seed=0, only=("itc", "itm", "itg"), owner=None):
        """{"itc", "itm", "itg": scalar} of B pairs, those in `only`; to be summed.

        ids, mask (B, T) from words.encode, the same B on every rank. seed: of the negatives, the
        same on every rank. owner (B,): a number for each picture, where one picture may occur
        twice. Pairs of one owner, or of the same words, are no negatives of each other, and share
        ITC's target. One pair alone has ITC 0. Raises data.BadData if nothing in the batch is a
        negative of anything: ITM would learn to say yes."""
        if odd := set(only) - {"itc", "itm", "itg"}:
            raise ValueError(f"losses: {', '.join(sorted(odd))} is none of itc, itm, itg")
        x, store, made = self.encode_vision(pixels), [], {}
        features = self.ln_vision(x)
        image = self.encode_image(features, store)
        if {"itc", "itm"} & set(only):
            text = self.encode_text(ids, mask)
            longest = int(all_gather(torch.tensor([ids.shape[1]], device=ids.device)).max())
            wide = (0, longest - ids.shape[1])
            ids_n = all_gather(F.pad(ids, wide, value=self.tokenizer.pad))
            mask_n = all_gather(F.pad(mask, wide))
            first = dist.get_rank() * len(ids) if len(ids_n) > len(ids) else 0
            mine = slice(first, first + len(ids))
            same = (ids_n[mine, None] == ids_n).all(-1)                                # (B, N)
            if owner is not None:
                same = same | (owner[:, None] == all_gather(owner))
            both = similarities(image, text, all_gather(image), all_gather(text), self.temp)
        if "itc" in only:
            made["itc"] = itc_loss(*both, same)
        if "itm" in only:
            if bool(all_gather(same.all().view(1)).all()):          # refused by all ranks, or by none
                raise data.BadData(f"a batch of {len(ids_n)} pairs with the same words or picture "
                                   "has no negatives: shuffle the data, or take a larger batch")
            drawn = hard_negatives(*both, same, seed, first)
            wrong_image, wrong_text = drawn.clamp(min=0)
            # gathered before ln_vision, which is run again here: so it learns from the negatives,
            # wherever they come from, and no gradient has to travel between ranks
            features = torch.cat((features, self.ln_vision(all_gather(x)[wrong_image]), features))
            ids3 = torch.cat((ids_n[mine], ids_n[mine], ids_n[wrong_text]))
            mask3 = torch.cat((mask_n[mine], mask_n[mine], mask_n[wrong_text]))
            made["itm"] = itm_loss(self.matched(features, ids3, mask3), drawn)
        if "itg" in only:
            begun = ids.clone()
            begun[:, 0] = self.tokenizer.dec
            # under itg the queries' keys and values are those of itc: they are not made again
            out = self.head(self.qformer(None, begun, itg, mask, past=store))
            made["itg"] = itg_loss(out, self.qformer.word.weight, self.head.bias, ids, mask)
        return {name: made[name] for name in only}

    def fits(self, words):
        """Take these words. Raises data.BadModel if there are more than rows for them."""
        if len(words) > self.qformer.config.vocab:
            raise data.BadModel(f"the tokenizer has {len(words)} tokens, the Q-Former "
                                f"{self.qformer.config.vocab} rows; take both from one place")
        self.tokenizer = words
        return self

    @classmethod
    def from_pretrained(cls, folder, dtype=None, vision=None):
        """From a folder or hub id: transformers' Blip2ForImageTextRetrieval, what save_pretrained
        writes, or LAVIS' tensors as safetensors beside a config.json and tokenizer of the former.

        dtype: of the eye, None for the file's own; the rest computes in fp32, because in fp16 its
        losses overflow (LAVIS issue 267). vision: a folder with the eye, for a LAVIS file that was
        saved without what was frozen. transformers' files have no head for captions and no
        temperature: both begin anew, which ITC's cosine and ITM do not notice, and ITG must learn.
        Raises data.BadModel, data.Offline."""
        folder = resolve(folder)
        c, weights, words = read_config(folder), data.load_weights(folder), BertTokenizer(folder)
        lavis = any(k.startswith("Qformer.bert.") for k in weights)
        eye, config = ViTConfig(**configs.vision_tower(c)), Config(**configs.qformer(c))
        Processor(folder, c["model_type"]).expect(eye.image_size, "squash", "a Q-Former's are squashed")
        shared, eps = c.get("image_text_hidden_size", 256), c.get("ln_vision_eps")
        eps = 1e-5 if lavis and eps is None else eye.eps if eps is None else eps
        if type(shared) is not int or not 1 <= shared <= 2 ** 15 or not (
                type(eps) in (int, float) and eps > 0):
            raise data.BadModel(f"{folder}: config.json says image_text_hidden_size {shared!r} and "
                                f"ln_vision_eps {eps!r}; take the config.json of the weights")
        with torch.device("meta"):
            model = cls(eye, config, shared, eps).fits(words)
        names, rest = model.names(), nn.Module()
        if lavis:
            names = cls.LAVIS_NAMES
            if vision is not None:
                model.vision = None
            elif not any(k.startswith("visual_encoder.") for k in weights):
                raise data.BadModel(f"{folder}: saved without its frozen eye; name the eye's "
                                    "folder as well (vision=)")
        else:
            rest.head, rest.temp = LMHead(config), nn.Parameter(torch.tensor(.07))
            init_weights(rest.head, config.width)
            if (folder / "pretraining.safetensors").exists():
                load_into(rest, cls.REST_NAMES,
                          data.load_weights(folder / "pretraining.safetensors"))
            model.head = model.temp = None                  # not in the main file
        load_into(model, names, weights, cls.IGNORE, dtype)
        if not lavis:
            model.head, model.temp = rest.head, rest.temp
        if model.vision is None:
            model.vision = ViT.from_pretrained(vision, dtype).without_final_block().requires_grad_(False)
            if model.vision.config.width != config.vision_width:
                raise data.BadModel(f"{vision}: an eye {model.vision.config.width} wide, the "
                                    f"Q-Former looks at {config.vision_width}; give the one it knows")
        for name, p in model.named_parameters():
            if not name.startswith("vision."):
                p.data = p.data.float()
        return model.eval()

    def names(self):
        """The weight table, in transformers' spelling where it has one, in LAVIS' elsewhere."""
        eye = prefixed(self.vision.names(), "vision.", "vision_model.")
        return {**eye, **self.NAMES, **self.REST_NAMES}

    def save_pretrained(self, folder):
        """config.json, model.safetensors, tokenizer and preprocessor_config.json, which load in
        transformers' Blip2ForImageTextRetrieval; head and temperature, for which it has no place,
        in pretraining.safetensors. With CLIP as the eye the names are CLIP's, and transformers,
        whose BLIP-2 has no such eye, cannot load it."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors, rest = export(self, self.names()), set(self.REST_NAMES.values())
        save_weights(folder, {k: v for k, v in tensors.items() if k not in rest})
        aside = folder / "pretraining.safetensors.tmp"
        save_file({k: v.contiguous() for k, v in tensors.items() if k in rest}, aside)
        aside.replace(folder / "pretraining.safetensors")
        eye = self.vision.config
        config = {"model_type": "blip-2", "dtype": dtype_name(self.vision.patch.dtype),
                  "architectures": ["Blip2ForImageTextRetrieval"] if eye.eva else [],
                  "num_query_tokens": self.qformer.config.num_queries, "image_token_index": None,
                  "image_text_hidden_size": self.visual_projection.out_features,
                  "ln_vision_eps": self.ln_vision.eps, "vision_config": configs.vit_to_hf(eye),
                  "qformer_config": configs.qformer_to_hf(self.qformer.config)}
        picture = {"image_processor_type": "BlipImageProcessor",
                   "processor_class": "Blip2Processor", "do_resize": True, "resample": 3,
                   "size": {"height": eye.image_size, "width": eye.image_size}, "do_rescale": True,
                   "rescale_factor": 1 / 255, "do_normalize": True, "do_convert_rgb": True,
                   "image_mean": list(data.MEAN), "image_std": list(data.STD)}
        for name, content in (("config.json", config), ("preprocessor_config.json", picture)):
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")
        self.tokenizer.save(folder)


# --------------------------------------------------------------------------------- first values

@torch.no_grad()
def init_weights(module, width, seed=0):
    """Starting values: N(0, 0.02) at the published width of 768, more where sums are shorter; norms
    1, biases 0. From a generator of its own: the program's stays where it was."""
    dice = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        if p.dim() > 1:
            p.normal_(0, .02 * (768 / width) ** .5, generator=dice)
        else:
            p.fill_(float(name.endswith("norm.weight") or name == "weight"))


# ---------------------------------------------------------------------------------------- alone

def print_masks():
    """The masks, and the shapes of a pass under each."""
    torch.manual_seed(0)
    q, T = QFormer(Config(width=64, depth=2, heads=2, mlp=128, num_queries=3, vision_width=32, vocab=50)), 5
    ids, features = torch.randint(50, (1, T)), torch.randn(1, 16, 32)
    for rule, says in ((itc, "two towers in one: contrast"), (itm, "one reader: do they belong?"),
                       (itg, "words after pictures: write")):
        print(f"{rule.__name__}: {says}")
        for row in visible(rule, 3 + T, 3 + T, n=3).tolist():
            print("   " + " ".join(".#"[seen] for seen in row))
        print(f"   features {tuple(features.shape)} and words {tuple(ids.shape)} -> "
              f"{tuple(q(features, ids, rule).shape)}\n")
    print("features alone ->", tuple(q(features).shape), "  words alone ->",
          tuple(q(None, ids, itc).shape))


def main():
    p = argparse.ArgumentParser(description="How well do captions fit a picture? Without arguments:"
                                            " draw the masks.", allow_abbrev=False)
    p.add_argument("image", nargs="?")
    p.add_argument("captions", nargs="*")
    p.add_argument("--model", default=Path(__file__).parent / "runs/toy/blip2/stage1/model")
    args = p.parse_args()
    if args.image is None:
        return print_masks()
    if not args.captions:
        raise UsageError('no caption: give one or more behind the picture, each "in quotes"')
    if not Path(args.model).exists() and args.model == p.get_default("model"):
        raise data.BadModel(f"{args.model}: no such folder; make it by python train.py --recipe "
                            "blip2 --stage 1, or give --model FOLDER_OR_HUB_ID")
    model = Blip2Stage1.from_pretrained(args.model)
    pixels = data.preprocess(data.load_image(args.image), model.image_size, "squash")
    ids, mask = model.tokenizer.encode(args.captions, length=35)
    with torch.inference_mode():
        features = model.ln_vision(model.encode_vision(pixels))
        cosine = max_query_similarity(model.encode_image(features), model.encode_text(ids, mask))[0]
        logits = model.matched(features.expand(len(ids), -1, -1), ids, mask)
    print("  itc   itm   score   (cosine, probability of a match, match logit + cosine)")
    for c, (no, yes), text in zip(cosine.tolist(), logits.tolist(), args.captions):
        print(f"{c:5.2f} {1 / (1 + math.exp(min(no - yes, 700))):5.2f} {yes + c:7.2f}   {text}")


if __name__ == "__main__":
    sys.exit(exit_status(main))
