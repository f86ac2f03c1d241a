"""qformer.py: ask an image 32 learned questions, and read the answers as 32 vectors.

    queries (Q, C) learned --+                   pixels -> vision tower -> ln_vision -> (1+P, Cv)
    text    (T, C) tokens ---+- norm -> `depth` blocks, with BERT's layout:
                                                                           queries   text
        self-attention   over queries and text, under one of three masks      x        x
        cross-attention  to the image features, in every second block         x
        MLP              one for the queries, another for the text            x        x

The result has the same size for every image. BLIP-2 [BLIP-2] 2301.12597 trains it in two stages:
with three losses (this file), then in front of a language model (projector.py).

The three masks. Row: the token that looks; column: the token it may see. Q = 2, then T = 4:

    itc  # # . . . .      itm  # # # # # #      itg  # # . . . .
         # # . . . .           # # # # # #           # # . . . .
         . . # # # #           # # # # # #           # # # . . .
         . . # # # #           # # # # # #           # # # # . .
         . . # # # #           # # # # # #           # # # # # .
         . . # # # #           # # # # # #           # # # # # #

    itc  contrast  queries and text do not see each other: two towers in one, compared in the batch
    itm  matching  everything sees everything: does this caption belong to this image?
    itg  writing   text sees the queries and the text before it, queries see no text: write the
                   caption, which can only use what the queries have found

Two details give wrong numbers and no error when they are missed: positions of text count from 0,
although queries come first; queries have no positions, but the same first norm as the text.
Left out: dropout (0.1 officially). Checked against transformers' Blip2ForImageTextRetrieval and
InstructBLIP (tests/test_qformer.py).
Letters: B batch, T text tokens, Q queries, P patches (1+P: the class token is read, too), S keys, C
width, Cv the tower's, H heads, D head size, E shared width, V vocabulary, N pairs on all ranks.
Alone: `qformer.py` prints the masks, `qformer.py photo.jpg "a caption" "another"` scores captions.
"""

import argparse
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import clip
import data
from formats import checkpoints, configs, folders, names, unused
from formats.bert import BertTokenizer
from formats.errors import exit_status
from kernels import attention, full, gelu, linear_cross_entropy, spans
from kernels.attention import visible
from kernels.gather import all_gather, gather_texts, require_negatives


# ------------------------------------------------------------------------------------ the masks
# May the token at index q of the row see the one at index k? The first n tokens are the learned
# queries. kernels/attention.py calls the same functions in PyTorch and inside its GPU kernel.

def itc(q, k, n):
    return (q < n) == (k < n)


def itm(q, k, n):
    return (q >= 0) & (k >= 0)              # always True, in the shape of q and k together


def itg(q, k, n):
    return (k < n) | ((q >= n) & (k <= q))  # q >= n is for the reader: the same without it


# where the rules are True, so that the kernel skips what they hide
itc.keys = itc.queries = spans.itc_span
itm.keys = itm.queries = full.keys
itg.keys, itg.queries = spans.itg_keys, spans.itg_queries


@dataclass(frozen=True)
class Config:
    """Sizes. Defaults are BLIP-2's, which are BERT-base's."""
    width: int = 768                # C
    depth: int = 12                 # number of blocks
    heads: int = 12                 # H
    mlp: int = 3072                 # width inside the MLP
    eps: float = 1e-12              # of the norms
    num_queries: int = 32           # Q
    vision_width: int = 1408        # Cv, width of the image features
    vocab: int = 30523              # BERT's 30,522 and [DEC], which begins a caption; 0: no text
    context: int = 512              # longest text in tokens
    cross_attention_freq: int = 2   # cross-attention in blocks 0, 2, 4 ...


class Attention(nn.Module):
    """norm(x + attention(x, source)): self-attention, or cross-attention to image features."""

    def __init__(self, c, source_width):
        super().__init__()
        self.heads = c.heads
        self.q = nn.Linear(c.width, c.width)
        self.kv = nn.Linear(source_width, 2 * c.width)
        self.out = nn.Linear(c.width, c.width)
        self.norm = clip.LayerNorm(c.width, c.eps)

    def forward(self, x, source, allow=full, n=0, attention_mask=None, past_kv=None):
        """x (B, T, C), any tokens; source (B, S, C or Cv); past_kv: keys, values before source's.
        Returns (B, T, C), and keys and values (B, S, H, D) for a later past_kv."""
        B, T, C = x.shape
        q = self.q(x).view(B, T, self.heads, C // self.heads)
        k, v = self.kv(source).view(B, -1, 2, self.heads, C // self.heads).unbind(2)
        start = 0                                       # index of x's first token in the row
        if past_kv is not None:
            start = past_kv[0].shape[1]
            k, v = torch.cat((past_kv[0], k), 1), torch.cat((past_kv[1], v), 1)
        y = attention(q, k, v, allow, n, start, attention_mask)
        return self.norm(x + self.out(y.reshape(B, T, C))), (k, v)


class FeedForward(nn.Module):
    """norm(x + MLP(x))."""

    def __init__(self, c):
        super().__init__()
        self.up = nn.Linear(c.width, c.mlp)
        self.down = nn.Linear(c.mlp, c.width)
        self.norm = clip.LayerNorm(c.width, c.eps)

    def forward(self, x):
        return self.norm(x + self.down(gelu(self.up(x))))


class Block(nn.Module):
    """Self-attention together; cross-attention for the queries; an MLP for each."""

    def __init__(self, c, layer):
        super().__init__()
        self.attention = Attention(c, c.width)
        self.cross = Attention(c, c.vision_width) if layer % c.cross_attention_freq == 0 else None
        self.mlp = FeedForward(c)                               # of the queries
        self.text_mlp = FeedForward(c) if c.vocab else None

    def forward(self, x, num_queries, features, allow, attention_mask, past_kv):
        """x (B, Q+T, C), queries first. Text alone: num_queries 0; past_kv holds the queries' keys
        and values, or is None: no image. Returns x, and its self-attention's keys and values."""
        n = num_queries if past_kv is None else past_kv[0].shape[1]     # queries in the whole row
        x, kv = self.attention(x, x, allow, n, attention_mask, past_kv)
        queries, text = x[:, :num_queries], x[:, num_queries:]
        if num_queries:
            if self.cross is not None:
                queries, _ = self.cross(queries, features)      # only queries see the image
            queries = self.mlp(queries)
        if text.shape[1]:
            text = self.text_mlp(text)
        return torch.cat((queries, text), 1), kv


class QFormer(nn.Module):
    """Learned queries and, if it has a vocabulary, text, through blocks like BERT's."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        # the files have a dimension of size 1 in front
        self.query_tokens = nn.Parameter(torch.randn(1, c.num_queries, c.width) * .02)
        if c.vocab:
            self.token = nn.Embedding(c.vocab, c.width)
            self.position = nn.Embedding(c.context, c.width)
        self.norm = clip.LayerNorm(c.width, c.eps)
        self.blocks = nn.ModuleList(Block(c, i) for i in range(c.depth))

    def forward(self, features, ids=None, allow=itm, text_mask=None, store=None,
                past_key_values=None):
        """Queries and text through all blocks -> (B, Q+T, C), queries first.
        features (B, 1+P, Cv), after ln_vision; None: text alone. ids (B, T); None: queries alone.
        text_mask (B, T) bool, False at padding. store: a list that receives each block's keys and
        values (B, Q, H, D). past_key_values: a list that a call with queries alone has filled; the
        text then comes out, under `itg`, as if the queries stood before it."""
        configs.check_qformer_call(self.config, features, ids, past_key_values)
        attention_mask, rows, num_queries = None, [], 0
        if features is not None:
            num_queries = self.config.num_queries
            features = features.to(self.query_tokens.dtype)     # the tower may be in half precision
            rows.append(self.query_tokens.expand(len(features), -1, -1))       # (B, Q, C)
        if ids is not None:
            rows.append(self.token(ids) + self.position.weight[:ids.shape[1]])  # (B, T, C)
            if text_mask is not None:                           # queries are never padding
                ahead = num_queries if past_key_values is None else past_key_values[0][0].shape[1]
                attention_mask = F.pad(text_mask, (ahead, 0), value=True)      # (B, Q+T)
        x = self.norm(torch.cat(rows, 1))                                      # (B, Q+T, C)
        for i, block in enumerate(self.blocks):
            past_kv = None if past_key_values is None else past_key_values[i]
            x, kv = block(x, num_queries, features, allow, attention_mask, past_kv)
            if store is not None:
                store.append(kv)
        return x

    @classmethod
    def from_pretrained(cls, folder, dtype=None, text=True):
        """From a folder or hub id of a BLIP-2 (either stage), an InstructBLIP or a LAVIS model, in
        `dtype` (None: the file's own). text=False leaves the text branch out."""
        folder = checkpoints.resolve(folder)
        weights = checkpoints.load_weights(folder)
        with torch.device("meta"):                      # shapes without memory
            model = cls(Config(**configs.read_qformer(folder, text)))
        table, ignore = names.qformer(weights), unused.qformer(text)
        return checkpoints.load_into(model, table, weights, ignore, dtype).eval()


# ------------------------------------------------------------------------------- three losses
# All are of this rank's B pairs. The N = B * world_size pairs of all ranks stand in the order of
# the ranks. `same` (B, N): may my pair (row) and pair of all ranks (column) exchange image or text?
# Names in the plural (images, texts) are of all ranks, and come without gradient.

def max_query_similarity(image, text):
    """(B, Q, E) and (N, E) unit vectors -> (B, N): cosine of the text and its best query."""
    return torch.einsum("bqe,ne->bqn", image, text).amax(1)


def similarities(image, text, images, texts, temp):
    """My (B, Q, E) and (B, E), all ranks' (N, Q, E) and (N, E) -> two (B, N): my images to all
    texts, my texts to all images. Divided by the temperature after the best query is chosen."""
    return max_query_similarity(image, texts) / temp, max_query_similarity(images, text).T / temp


def itc_loss(to_text, to_image, same, smoothing=.1):
    """Which text is the image's, and which image the text's?      [BLIP-2] 3.2; LAVIS' target
    to_text, to_image, same (B, N) -> scalar. Gathered vectors carry no gradient, so images learn
    from to_text alone and texts from to_image. Several right columns share the target."""
    target = (1 - smoothing) * same / same.sum(1, keepdim=True) + smoothing / same.shape[1]
    return (F.cross_entropy(to_text, target) + F.cross_entropy(to_image, target)) / 2


def hard_negatives(to_text, to_image, same, seed=0, first=0):
    """Draw a wrong image for each of my texts, and a wrong text for each of my images.
    The more similar, the likelier: softmax of a row without its right columns. The draw depends
    only on (seed, index among all N pairs); `first` is the index of my first pair. Returns columns
    (2, B): images, then texts; -1 where no column is wrong."""
    B, N = same.shape
    u = torch.rand(N, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    u = u[first:first + B].T.to(same.device, torch.float64)                    # (2, B)
    scores = torch.stack((to_image, to_text)).detach().double()                # (2, B, N)
    # a row without a wrong column is NaN
    weights = scores.masked_fill(same, -torch.inf).softmax(-1).nan_to_num(0)
    cumulative = weights.cumsum(-1)
    # inverse-CDF sampling: the first column whose cumulative weight is above u
    drawn = (cumulative <= (u * cumulative[..., -1])[..., None]).sum(-1)       # (2, B)
    return drawn.masked_fill(same.all(1), -1)


def itm_loss(logits, negatives):
    """Do they belong together? logits (3 B, 2), index 1 is yes, of pairs in this order:
        texts      mine    mine    wrong          B each
        images     mine    wrong   mine
        label      1       0       0              none where no wrong one was found (-1)"""
    wrong = negatives.clamp(max=0).flatten()            # an index becomes label 0; -1 stays -1
    labels = torch.cat((torch.ones_like(negatives[0]), wrong))
    return F.cross_entropy(logits, labels.where(labels >= 0, data.IGNORE))


def itg_loss(x, weight, bias, ids, mask, smoothing=.1):
    """Write the caption: next-token loss, a mean over all text tokens, the closing [SEP] too.
    x (B, T, C) at [DEC] and the text, ids and mask (B, T), the head's weight (V, C), bias (V)."""
    labels = ids[:, 1:].where(mask[:, 1:], data.IGNORE).flatten()
    # the loss kernel has no bias: it becomes the weight of a channel of ones (and 7 of zeros)
    one = F.pad(torch.ones_like(x[:, 1:, :1]), (0, 7))                         # (B, T-1, 8)
    x = torch.cat((x[:, :-1], one), -1).flatten(0, 1)                          # (B*(T-1), C+8)
    weight = torch.cat((weight, F.pad(bias[:, None], (0, 7))), 1)              # (V, C+8)
    return linear_cross_entropy(x, weight, labels, smoothing=smoothing)


# ------------------------------------------------------------------------------ BLIP-2, stage 1

class LMHead(nn.Module):
    """BERT's language-model head, without its last product, which uses the token embeddings."""

    def __init__(self, c):
        super().__init__()
        self.dense = nn.Linear(c.width, c.width)
        self.norm = clip.LayerNorm(c.width, c.eps)
        self.bias = nn.Parameter(torch.zeros(c.vocab))

    def forward(self, x):
        return self.norm(gelu(self.dense(x)))


class Blip2Stage1(nn.Module):
    """A frozen vision tower, a Q-Former, and what its three losses need."""

    def __init__(self, vision, config, shared=256, eps=None):
        """vision: clip.Config; config: Config; shared: E; eps: ln_vision's (None: the tower's)."""
        super().__init__()
        configs.check_stage1(vision, config)
        self.vision = clip.ViT(vision).requires_grad_(False)
        # quirk: 1e-5 in LAVIS whatever the tower has; the tower's (1e-6) in transformers
        self.ln_vision = clip.LayerNorm(vision.width, vision.eps if eps is None else eps)
        self.qformer = QFormer(config)
        self.vision_proj = nn.Linear(config.width, shared)
        self.text_proj = nn.Linear(config.width, shared)
        self.itm_head = nn.Linear(config.width, 2)
        self.lm_head = LMHead(config)
        self.temp = nn.Parameter(torch.tensor(.07))     # divides the cosines, and is never clamped
        self.tokenizer = None                           # a BertTokenizer

    @property
    def image_size(self):
        return self.vision.config.image_size

    def encode_vision(self, pixels):
        """pixels (B, 3, S, S) -> (B, 1+P, Cv) of the frozen tower, before ln_vision."""
        with torch.no_grad():
            x = self.vision(pixels.to(self.vision.patch.dtype))
        return x.to(self.ln_vision.weight.dtype)

    def encode_image(self, features, store=None):
        """features (B, 1+P, Cv), after ln_vision -> (B, Q, E) unit vectors."""
        x = self.qformer(features, allow=itc, store=store)
        return F.normalize(self.vision_proj(x), dim=-1)

    def encode_text(self, ids, mask):
        """ids, mask (B, T) -> (B, E) unit vectors, read at [CLS]."""
        x = self.qformer(None, ids, itc, mask)
        return F.normalize(self.text_proj(x[:, 0]), dim=-1)

    def itm_logits(self, features, ids, mask):
        """(B, 2), index 1 is yes: the mean over queries of logits, not of probabilities."""
        x = self.qformer(features, ids, itm, mask)
        return self.itm_head(x[:, :self.qformer.config.num_queries]).mean(1)

    def losses(self, pixels, ids, mask, seed=0, only=("itc", "itm", "itg"), image_ids=None):
        """{"itc", "itm", "itg": scalar} of B pairs, those in `only`; their sum is the loss.
        ids, mask (B, T) from tokenizer.encode; B and seed (of negatives) are alike on all ranks.
        image_ids (B,): equal where two pairs have the same image. Raises BadData if nothing in the
        batch is a negative: ITM would learn to say yes."""
        configs.check_losses(only)
        vision, queries_kv, out = self.encode_vision(pixels), [], {}
        features = self.ln_vision(vision)                                      # (B, 1+P, Cv)
        image = self.encode_image(features, queries_kv)                        # (B, Q, E)
        if "itc" in only or "itm" in only:
            text = self.encode_text(ids, mask)                                 # (B, E)
            sims = similarities(image, text, all_gather(image), all_gather(text), self.temp)
            all_ids, all_mask, first = gather_texts(ids, mask, self.tokenizer.pad)
            # pairs with one text, or one image, are no negatives and share ITC's target
            same = (all_ids[first:first + len(ids), None] == all_ids).all(-1)  # (B, N)
            if image_ids is not None:
                same = same | (image_ids[:, None] == all_gather(image_ids))
        if "itc" in only:
            out["itc"] = itc_loss(*sims, same)
        if "itm" in only:
            require_negatives(same)
            negatives = hard_negatives(*sims, same, seed, first)               # (2, B)
            out["itm"] = self.matching_loss(vision, features, all_ids, all_mask, first, negatives)
        if "itg" in only:
            out["itg"] = self.caption_loss(ids, mask, queries_kv)
        return {name: out[name] for name in only}

    def matching_loss(self, vision, features, all_ids, all_mask, first, negatives):
        """Matching: each pair, and each of its halves with a hard negative."""
        wrong_image, wrong_text = negatives.clamp(min=0)                       # (B,) each
        # vision features are gathered before ln_vision, which runs again here: so ln_vision learns
        # from the negatives of all ranks, and no gradient has to travel between ranks
        wrong = self.ln_vision(all_gather(vision)[wrong_image])                # (B, 1+P, Cv)
        images = torch.cat((features, wrong, features))                        # (3 B, 1+P, Cv)
        mine = torch.arange(first, first + len(wrong_text), device=wrong_text.device)
        texts = torch.cat((mine, mine, wrong_text))                            # (3 B,)
        return itm_loss(self.itm_logits(images, all_ids[texts], all_mask[texts]), negatives)

    def caption_loss(self, ids, mask, queries_kv):
        """Writing: [DEC] takes the place of [CLS]. The queries see the same under itg as under itc,
        so their keys and values are reused, with gradient: this loss trains the queries too."""
        decoder_ids = ids.clone()
        decoder_ids[:, 0] = self.tokenizer.dec
        x = self.qformer(None, decoder_ids, itg, mask, past_key_values=queries_kv)  # (B, T, C)
        return itg_loss(self.lm_head(x), self.qformer.token.weight, self.lm_head.bias, ids, mask)

    @classmethod
    def from_pretrained(cls, folder, dtype=None, vision=None):
        """From a folder or hub id of transformers or LAVIS. dtype: of the vision tower; the rest is
        fp32, as fp16 overflows (LAVIS issue 267). vision: the tower's folder, if elsewhere."""
        folder = checkpoints.resolve(folder)
        weights = checkpoints.load_weights(folder)
        vit, config, shared, eps = configs.read_stage1(folder, weights)
        with torch.device("meta"):                      # shapes without memory
            model = cls(clip.Config(**vit), Config(**config), shared, eps)
        model.tokenizer = BertTokenizer(folder).check_fits(model.qformer.config.vocab)
        vision = vision or folders.tower_folder(folder)
        tower = None if vision is None else clip.ViT.from_pretrained(vision, dtype)
        return folders.load_stage1(model, folder, weights, dtype, tower).eval()

    def save_pretrained(self, folder):
        """What from_pretrained reads, and transformers' Blip2ForImageTextRetrieval too."""
        folders.save_stage1(self, folder)


def print_masks():
    """The masks, and the shapes of a pass under each."""
    torch.manual_seed(0)
    qformer = QFormer(Config(64, 2, 2, 128, num_queries=3, vision_width=32, vocab=50))
    ids, features = torch.randint(50, (1, 5)), torch.randn(1, 16, 32)
    for rule in (itc, itm, itg):
        print(f"{rule.__name__}:")
        for row in visible(rule, 8, 8, n=3).tolist():
            print("   " + " ".join(".#"[seen] for seen in row))
        out = qformer(features, ids, rule)                                     # (1, 3+5, 64)
        print(f"   features {tuple(features.shape)}, text {tuple(ids.shape)} -> {tuple(out.shape)}")
    print("features alone ->", tuple(qformer(features).shape), "  text alone ->",
          tuple(qformer(None, ids, itc).shape))


def main():
    """How well do captions fit an image? Without arguments: print the masks."""
    parser = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False)
    parser.add_argument("image", nargs="?")
    parser.add_argument("captions", nargs="*")
    parser.add_argument("--model", help="default: toy/weights/qformer")
    args = parser.parse_args()
    if args.image is None:
        return print_masks()
    model = Blip2Stage1.from_pretrained(folders.scoring_model(args))
    pixels = data.preprocess(data.load_image(args.image), model.image_size, "squash")
    ids, mask = model.tokenizer.encode(args.captions, length=35)
    with torch.inference_mode():
        features = model.ln_vision(model.encode_vision(pixels))                # (1, 1+P, Cv)
        image, text = model.encode_image(features), model.encode_text(ids, mask)
        cosines = max_query_similarity(image, text)[0]                         # (captions,)
        logits = model.itm_logits(features.expand(len(ids), -1, -1), ids, mask)
    print("  itc   itm   score   (cosine, probability of a match, match logit + cosine)")
    matches = logits.softmax(-1)[:, 1]
    for cosine, match, yes, caption in zip(cosines, matches, logits[:, 1], args.captions):
        print(f"{cosine:5.2f} {match:5.2f} {yes + cosine:7.2f}   {caption}")


if __name__ == "__main__":
    sys.exit(exit_status(main))
