"""llms/opt.py: OPT, the decoder that BLIP-2 was published with.    [OPT] 2205.01068

    ids (B, T) -> embed -> x (B, T, C)      or x comes from outside: an image's vectors do
                           x += position(0, 1, 2 ...)
    depth times:           x += attention(LayerNorm(x))       causal, one key head a query head
                           x += down(relu(up(LayerNorm(x))))
    LayerNorm -> head, which is the embedding -> logits (B, T, V)

Read it beside llama.py. What differs there and here:

                 LLaMA                          OPT
    norm         RMS, no bias                   mean and variance, with a bias
    positions    rotations of q and k           a learned vector, added once to the input
    MLP          silu(gate) * up                relu(up)
    biases       none                           in every linear layer but the head
    head         of its own                     the embedding

quirk: the table of positions has two rows in front that no token uses: position t is row t + 2
(fairseq kept row 1 for padding). So 2,048 positions are 2,050 rows, and a text that is longer has
no positions: it is refused. Padding is not counted: the first real token has position 0, wherever
it stands, and in BLIP-2 the image's first vector is that token.

Checked against transformers' OPTForCausalLM (tests/test_llms.py). Left out: dropout, and OPT-350m,
whose norms come after the sums and whose embedding is narrower than its blocks.
Letters: B batch, T tokens, C width, H heads, D head size, F MLP width, V vocabulary.
Next: t5.py, an encoder and a decoder.
"""

from dataclasses import dataclass

import torch
from torch import nn

from clip import LayerNorm
from formats import language_models
from formats.errors import BadData
from kernels import checkpointed, self_attention
from llama import Llama

OFFSET = 2          # rows of the position table before position 0
EPS = 1e-5          # of all norms; config.json cannot say another


@dataclass(frozen=True)
class Config:
    """Sizes of an OPT. Defaults are OPT-2.7b's."""
    vocab: int = 50272              # V
    width: int = 2560               # C
    depth: int = 32                 # number of blocks
    heads: int = 32                 # H
    mlp: int = 10240                # F
    context: int = 2048             # positions, and so the longest text in tokens
    tie_embeddings: bool = True     # the head is the embedding
    bos: int | None = 2             # kept for the file; the tokenizer says what is used
    eos: int | tuple | None = 2     # the same; 50118, the newline, in BLIP-2
    pad: int | None = 1

    @property
    def kv_heads(self):
        return self.heads

    @property
    def head_dim(self):
        return self.width // self.heads


class Block(nn.Module):
    """One layer. q, k and v are one matrix product."""

    def __init__(self, c, layer):
        super().__init__()
        self.heads, self.layer = c.heads, layer
        self.norm1 = LayerNorm(c.width, EPS)
        self.qkv = nn.Linear(c.width, 3 * c.width)
        self.out = nn.Linear(c.width, c.width)
        self.norm2 = LayerNorm(c.width, EPS)
        self.up = nn.Linear(c.width, c.mlp)
        self.down = nn.Linear(c.mlp, c.width)

    def forward(self, x, cache=None, attention_mask=None, doc_spans=None):
        """x (B, T, C) -> (B, T, C)."""
        B, T, C = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, -1).unbind(2)  # (B, T, H, D)
        y = self_attention(q, k, v, None, cache, self.layer, attention_mask, doc_spans)
        x = x + self.out(y.reshape(B, T, C))
        return x + self.down(self.up(self.norm2(x)).relu())


class Opt(Llama):
    """The decoder. `forward`, `next_logits`, `predictions` and `resize_embeddings` are Llama's:
    they know no more of a decoder than `embed`, `hidden` and `head`."""
    kind = "opt"
    table = language_models.OPT

    def __init__(self, config):
        nn.Module.__init__(self)                            # not Llama's, which makes its blocks
        self.config = c = config
        self.embed = nn.Embedding(c.vocab, c.width)
        self.position = nn.Embedding(c.context + OFFSET, c.width)
        self.blocks = nn.ModuleList(Block(c, i) for i in range(c.depth))
        self.norm = LayerNorm(c.width, EPS)
        self.head = nn.Linear(c.width, c.vocab, bias=False)
        if c.tie_embeddings:
            self.head.weight = self.embed.weight

    def hidden(self, x, cache=None, position_ids=None, attention_mask=None, doc_spans=None):
        """Last hidden states (B, T, C), normed, of ids (B, T) or embeddings (B, T, C).

        position_ids (B, T); None: real tokens are counted, from the cache's on. The others are as
        in llama.Llama.hidden. Raises BadData for a text that is longer than the positions."""
        if not x.is_floating_point():
            x = self.embed(x)                               # ids -> (B, T, C)
        if position_ids is None:
            position_ids = self.count_positions(x, cache, attention_mask, doc_spans)
        # a row of a batch that has ended is computed on, past the last position: any row will do
        rows = position_ids.clamp(max=self.config.context - 1) + OFFSET
        x = x + self.position(rows)
        if cache is None:
            x = checkpointed(self.blocks, x, None, attention_mask, doc_spans,
                             policy=self.checkpoint, offload=self.offload)
        else:       # no checkpointing with a cache: a recomputed block would write its keys twice
            for block in self.blocks:
                x = block(x, cache)
            cache.advance(x.shape[1])
        return self.norm(x)

    def count_positions(self, x, cache, attention_mask, doc_spans):
        """Positions (B or 1, T) of x (B, T, C): how many real tokens stand before each; -1 at
        padding."""
        start = 0
        if cache is not None:
            start, attention_mask = cache.length, cache.attention_mask
        end = start + x.shape[1]
        position_ids = torch.arange(start, end, device=x.device)[None]      # (1, T)
        if attention_mask is not None:
            real = attention_mask[:, :end].long()                           # (B, S)
            position_ids = (real.cumsum(1) * real - 1)[:, start:]
        if doc_spans is not None:
            position_ids = position_ids - doc_spans[0]      # minus where each document begins
        if end > self.config.context:       # only then: .max() waits for the GPU
            longest = int(position_ids.max()) + 1
            if longest > self.config.context:
                raise BadData(f"a text of {longest:,} tokens: this OPT has {self.config.context:,} "
                              "positions; shorten it, or cut samples by --max-length")
        return position_ids

    @classmethod
    def from_pretrained(cls, folder, dtype=None):
        """From a folder or hub id in the Hugging Face layout, in `dtype` (None: the file's own).

        Raises BadModel, Offline."""
        return language_models.load(cls, Config, folder, dtype)

    def save_pretrained(self, folder):
        """config.json and model.safetensors, as transformers reads them."""
        language_models.save(self, folder)
