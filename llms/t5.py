"""llms/t5.py: FlanT5, an encoder that reads and a decoder that writes.

    prompt (B, S) -> embed -> encoder -> features (B, S, C)         once
                                            |
    start, answer so far (B, T) -> embed -> decoder -> head -> logits (B, T, V)

    encoder block    x += attention(RMSNorm(x))               every token sees every token
                     x += down(gelu(gate) * up) of RMSNorm(x)
    decoder block    x += attention(RMSNorm(x))               causal
                     x += cross-attention(RMSNorm(x))         to all of the encoder's features
                     x += down(gelu(gate) * up) of RMSNorm(x)

BLIP-2 gives the encoder an image's vectors and a prefix of the text; the decoder writes the rest,
the suffix, behind a start token, which is <pad>.

No vector and no rotation says where a token stands: a learned number for the distance of query and
key is added to their score, see kernels/biased.py. One table a stack serves all its layers (the
files keep it in the first). Cross-attention has none.

This is T5 1.1, which FlanT5 is: a gated GELU, a head of its own. T5 1.0 (ReLU) is refused.
[T5] 1910.10683; [Flan] 2210.11416; the gate [GLU] 2002.05202.

Checked against transformers' T5ForConditionalGeneration (tests/test_llms.py). Left out: dropout.
Letters: B batch, T tokens of the answer, S of the prompt, C width, H heads, D head size, F MLP
width, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from formats import language_models
from formats.errors import UsageError
from kernels import attention, biased_attention, checkpointed, distance_bias, full, hide_padding
from llama import Llama
from llama import RMSNorm as LlamaNorm
from llms.suffix import split_rows, unpack


@dataclass(frozen=True)
class Config:
    """Sizes of a T5. Defaults are FlanT5-XL's."""
    vocab: int = 32128              # V
    width: int = 2048               # C
    encoder_depth: int = 24         # number of blocks
    depth: int = 24                 # of the decoder
    heads: int = 32                 # H
    head_dim: int = 64              # D; H D may differ from C
    mlp: int = 5120                 # F
    eps: float = 1e-6
    buckets: int = 32               # of distances
    max_distance: int = 128         # from here on all distances share a bucket
    exact_gelu: bool = False        # BLIP-2's files ask for the exact GELU, FlanT5's for the tanh
    scale_outputs: bool = False     # quirk: T5 1.0, which is tied, divides its outputs by sqrt(C)
    tie_embeddings: bool = False    # the head is the embedding
    start: int = 0                  # the decoder's first token, <pad>
    pad: int = 0
    bos: int | None = None          # kept for the file
    eos: int | tuple | None = 1
    context: int = 2 ** 20          # distances have no end, so this is no limit of the model

    @property
    def kv_heads(self):
        return self.heads


class RMSNorm(LlamaNorm):
    """LLaMA's, its result in the weight's dtype: the sums between layers may be wider, see Mlp."""

    def forward(self, x):
        return super().forward(x).to(self.weight.dtype)


class Mlp(nn.Module):
    """down(gelu(gate(x)) * up(x)). In a model of float16 `down` stays in float32, as in
    transformers: its sums pass float16's largest number."""

    def __init__(self, c):
        super().__init__()
        self.gate_up = nn.Linear(c.width, 2 * c.mlp, bias=False)
        self.down = nn.Linear(c.mlp, c.width, bias=False)
        self.down.fp32_beside_fp16 = True                   # formats/language_models.py
        self.approximate = "none" if c.exact_gelu else "tanh"

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, -1)             # (B, T, F) each
        x = F.gelu(gate, approximate=self.approximate) * up
        return self.down(x.to(getattr(self.down, "weight", x).dtype))      # quantized: no weight


class EncoderBlock(nn.Module):
    """One layer of the encoder."""

    def __init__(self, c):
        super().__init__()
        self.heads, inner = c.heads, c.heads * c.head_dim
        self.norm1 = RMSNorm(c.width, c.eps)
        self.qkv = nn.Linear(c.width, 3 * inner, bias=False)
        self.out = nn.Linear(inner, c.width, bias=False)
        self.norm2 = RMSNorm(c.width, c.eps)
        self.mlp = Mlp(c)

    def self_attention(self, x, bias, cache=None, layer=0):
        B, T, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, -1).unbind(2)  # (B, T, H, D)
        if cache is not None:
            k, v = cache.update(layer, k, v)                # (B, S, H, D)
        return self.out(biased_attention(q, k, v, bias).reshape(B, T, -1))

    def forward(self, x, bias):
        """x (B, S, C) -> (B, S, C); bias (B or 1, H, S, S), added to the scores."""
        x = x + self.self_attention(x, bias)
        return x + self.mlp(self.norm2(x))


class DecoderBlock(EncoderBlock):
    """One layer of the decoder: the same, with cross-attention in the middle."""

    def __init__(self, c, layer):
        super().__init__(c)
        self.layer, inner = layer, c.heads * c.head_dim
        self.norm_cross = RMSNorm(c.width, c.eps)
        self.cross_q = nn.Linear(c.width, inner, bias=False)
        self.cross_kv = nn.Linear(c.width, 2 * inner, bias=False)
        self.cross_out = nn.Linear(inner, c.width, bias=False)

    def read(self, features):
        """Keys and values (B, S, H, D) of the encoder's features (B, S, C)."""
        B, S, _ = features.shape
        return self.cross_kv(features).view(B, S, 2, self.heads, -1).unbind(2)

    def forward(self, x, bias, features, mask, cache=None):
        """x (B, T, C); features (B, S, C), mask (B, S) bool or None: the encoder's. With a cache
        they are read once, and features are None from the second call on."""
        B, T, _ = x.shape
        x = x + self.self_attention(x, bias, cache, self.layer)
        known = {} if cache is None else cache.features
        if self.layer not in known:
            known[self.layer] = self.read(features)
        k, v = known[self.layer]
        if len(k) < B:                                      # beams of one prompt
            k, v = k.expand(B, -1, -1, -1), v.expand(B, -1, -1, -1)
        q = self.cross_q(self.norm_cross(x)).view(B, T, self.heads, -1)
        # the kernel divides scores by sqrt(D), and T5 does not
        y = attention(q * q.shape[-1] ** .5, k, v, full, attention_mask=mask)
        x = x + self.cross_out(y.reshape(B, T, -1))
        return x + self.mlp(self.norm2(x))


class T5(nn.Module):
    """Encoder and decoder. The prompt is embeddings, as llama.Llama's; the answer begins anew."""
    kind = "t5"
    table = language_models.T5
    # as llama.Llama's; a step's biases depend on the host's numbers, so no CUDA graph holds it
    checkpoint, offload, can_capture = None, False, False

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.embed = nn.Embedding(c.vocab, c.width)
        self.encoder = nn.ModuleList(EncoderBlock(c) for _ in range(c.encoder_depth))
        self.encoder_bias = nn.Embedding(c.buckets, c.heads)
        self.encoder_norm = RMSNorm(c.width, c.eps)
        self.decoder = nn.ModuleList(DecoderBlock(c, i) for i in range(c.depth))
        self.decoder_bias = nn.Embedding(c.buckets, c.heads)
        self.norm = RMSNorm(c.width, c.eps)
        self.head = nn.Linear(c.width, c.vocab, bias=False)
        if c.tie_embeddings:
            self.head.weight = self.embed.weight

    @property
    def blocks(self):
        """All layers, the encoder's first."""
        return nn.ModuleList((*self.encoder, *self.decoder))

    def encode(self, x, attention_mask=None):
        """Features (B, S, C) of a prompt's embeddings (B, S, C); mask (B, S), False at padding."""
        S = x.shape[1]
        bias = distance_bias(self.encoder_bias.weight, S, S, self.config.max_distance, True)
        bias = hide_padding(bias, attention_mask)                           # (B or 1, H, S, S)
        x = checkpointed(self.encoder, x, bias, policy=self.checkpoint, offload=self.offload)
        return self.encoder_norm(x)

    def decode(self, ids, features, mask=None, cache=None):
        """Last hidden states (B, T, C), normed, of ids (B, T): the start token and the answer so
        far; with a cache those behind the ones that it holds. features, mask: see DecoderBlock."""
        start = cache.length if cache is not None else 0
        T, c = ids.shape[1], self.config
        bias = distance_bias(self.decoder_bias.weight, T, start + T, c.max_distance, False)
        x = self.embed(ids)
        if cache is None:
            x = checkpointed(self.decoder, x, bias, features, mask, policy=self.checkpoint,
                             offload=self.offload)
        else:
            for block in self.decoder:
                x = block(x, bias, features, mask, cache)
            cache.advance(T)
        x = self.norm(x)
        return x * c.width ** -.5 if c.scale_outputs else x

    def forward(self, x, decoder_ids=None, attention_mask=None):
        """Prompt: ids (B, S) or embeddings (B, S, C), mask (B, S); decoder_ids (B, T), the start
        token first (None: alone) -> logits (B, T, V)."""
        if not x.is_floating_point():
            x = self.embed(x)
        decoder_ids = self.start_ids(x) if decoder_ids is None else decoder_ids
        features = self.encode(x, attention_mask)
        return self.head(self.decode(decoder_ids, features, attention_mask))

    def start_ids(self, x):
        return torch.full((len(x), 1), self.config.start, device=x.device)     # (B, 1)

    def next_logits(self, x, cache, position_ids=None, attention_mask=None):
        """Logits (B, V), fp32, of the token after the last one. x: embeddings (B, S, C) of the
        prompts, the first time, then ids (B, 1) of the answers. cache: a llama.KVCache, of which
        the prompts take no row; its mask says where they are padding. Raises UsageError if None."""
        if cache is None:
            raise UsageError("a T5 writes with a cache only: leave use_cache=False out")
        features = None
        if x.is_floating_point():
            mask = None if cache.attention_mask is None else cache.attention_mask[:, :x.shape[1]]
            features, cache.features = self.encode(x, mask), {"mask": mask}
            x = self.start_ids(x)
        return self.head(self.decode(x, features, cache.features["mask"], cache)[:, -1]).float()

    def predictions(self, x, labels, mask=None, doc_spans=None):
        """Hidden states (N, C) at the tokens before those with loss, and these tokens' ids (N).

        x (B, T, C) and labels (B, T) hold prompt and answer in one row: the encoder reads what has
        no loss, the decoder writes what has. mask (B, T) bool: False at padding. doc_spans: of the
        texts packed into one row; here they become rows again."""
        if doc_spans is not None:
            x, labels, mask = unpack(x, labels, doc_spans)
        rows = split_rows(x, labels, mask, self.config.start, self.config.pad)
        features = self.encode(rows.prompt, rows.mask)
        return self.decode(rows.answer, features, rows.mask)[rows.place], rows.targets

    resize_embeddings = Llama.resize_embeddings

    @classmethod
    def from_pretrained(cls, folder, dtype=None):
        """From a folder or hub id, in `dtype` (None: the file's). Raises BadModel, Offline."""
        return language_models.load(cls, Config, folder, dtype)

    def save_pretrained(self, folder):
        """config.json and model.safetensors, as transformers reads them."""
        language_models.save(self, folder)
