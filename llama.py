"""llama.py: a LLaMA decoder that takes embeddings as well as token ids, with its KV cache.

    ids (B, T) -> embed -> x (B, T, C)      or x comes from outside: an image's vectors do
    depth times:   x += attention(RMSNorm(x))        causal, RoPE, grouped keys and values
                                                     (Mistral-7B-v0.1: the last 4,096 keys only)
                   x += SwiGLU-MLP(RMSNorm(x))
    RMSNorm -> head -> logits (B, T, V)

What differs from the 2017 transformer: norms come before the blocks and divide by the root mean
square only; positions are rotations of q and k (RoPE, kernels/rope.py); the MLP is gated (SwiGLU:
silu(gate) * up, kernels/swiglu.py); no biases. [LLaMA] 2302.13971 section 2.2. Checked against
transformers' LlamaForCausalLM (tests/test_parity.py). One matrix is never split over several GPUs.

Decoding with a KV cache. Token t attends to the keys and values of tokens 0 .. t, which do not
change when t + 1 comes. So they are kept, and a step computes one token only:

    prompt    x (B, T, C)   writes rows 0 .. T-1 of the cache, attends to them
    step      x (B, 1, C)   writes row T, attends to rows 0 .. T;   then row T + 1 ...

Letters: B batch, T query-side tokens, S key-side tokens, C width, H heads, G key/value heads,
D head size, F MLP width, V vocabulary.
Alone: `python llama.py "The red star" [FOLDER]` continues a text, with the shipped toy model or
with your own. A question to a model that answers: `python generate.py --text`.
Next: projector.py, which puts an image's vectors between the tokens.
"""

import sys

from formats.text_flags import parse

if __name__ == "__main__":
    parse()                     # before torch is imported: --help answers at once

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

import data
from formats import checkpoints, configs, folders, names
from formats.errors import exit_status
from kernels import checkpointed, rms_norm, rope, rope_table, self_attention, swiglu


@dataclass(frozen=True)
class Config:
    """Sizes of a decoder. Defaults are Llama-2-7B's, which old hub configs leave out."""
    vocab: int = 32000              # V; 32,064 in LLaVA's files: room for <image>, and padding
    width: int = 4096               # C
    depth: int = 32                 # number of blocks
    heads: int = 32                 # H
    kv_heads: int = 32              # G: H / G query heads share a key and value head
    mlp: int = 11008                # F
    eps: float = 1e-6               # Hugging Face's default; Llama-2 and Vicuna-1.5 files say 1e-5
    rope_theta: float = 10000.0
    context: int = 2048             # longest text in tokens
    tie_embeddings: bool = False    # the head is the embedding
    head_size: int = 0              # D; 0: width / heads, as in all but a few
    rope_scaling: tuple | None = None       # of rotary positions, see kernels/rope.py
    window: int | None = None       # keys that a query sees, its own included; None: all before it
    bos: int | None = 1             # kept for the file; the tokenizer says what is used
    eos: int | tuple | None = 2     # the same; Llama-3 has several

    @property
    def head_dim(self):
        return self.head_size or self.width // self.heads


class KVCache:
    """Keys and values of the tokens so far, (B, capacity, G, D) a layer. The memory is taken once;
    a token writes its own row only.

    `attention_mask` (B, capacity) is False where a row's prompt was padded on the left; None:
    nowhere. decoding/cuda_graph.py has a subclass that counts on the GPU."""
    end = None                      # there: (B,), how many rows of the cache each sample sees
    features = None                 # of llms/t5.py: {layer: what it reads of the prompt}

    def __init__(self, config, batch, capacity, like, attention_mask=None):
        """like: a tensor of the dtype and on the device; attention_mask (B, T) of the prompt."""
        shape = (config.depth, batch, capacity, config.kv_heads, config.head_dim)
        self.k = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.v = torch.empty_like(self.k)
        self.length = 0                                 # tokens that all layers have written
        self.attention_mask = None
        # .all() waits for the GPU: once a prompt, not once a token
        if attention_mask is not None and not attention_mask.all():
            self.attention_mask = torch.ones(batch, capacity, dtype=torch.bool, device=like.device)
            self.attention_mask[:, :attention_mask.shape[1]] = attention_mask

    def update(self, layer, k, v):
        """Store one layer's (B, T, G, D) behind what is there; returns all so far, (B, S, G, D)."""
        end = self.length + k.shape[1]
        if end > self.k.shape[2]:
            raise ValueError(f"cache: {end} positions, room for {self.k.shape[2]}; "
                             "make it with a larger capacity")
        self.k[layer, :, self.length:end] = k
        self.v[layer, :, self.length:end] = v
        return self.k[layer, :, :end], self.v[layer, :, :end]

    def advance(self, T):
        """All layers have written T tokens."""
        self.length += T

    def reorder(self, rows):
        """Row i becomes what row rows[i] was: a beam continues its parent."""
        if len(rows) != self.k.shape[1]:
            self.k, self.v = self.k[:, rows], self.v[:, rows]
        elif rows.tolist() != list(range(len(rows))):       # in most steps nothing moves
            self.k[:, :, :self.length] = self.k[:, rows, :self.length]
            self.v[:, :, :self.length] = self.v[:, rows, :self.length]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x * x) + eps) * weight, over the last dimension."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


class Block(nn.Module):
    """One layer. qkv and gate_up are fused: one large matrix product instead of three or two."""

    def __init__(self, c, layer):
        super().__init__()
        self.c, self.layer = c, layer
        self.norm1 = RMSNorm(c.width, c.eps)
        self.qkv = nn.Linear(c.width, (c.heads + 2 * c.kv_heads) * c.head_dim, bias=False)
        self.out = nn.Linear(c.heads * c.head_dim, c.width, bias=False)
        self.norm2 = RMSNorm(c.width, c.eps)
        self.gate_up = nn.Linear(c.width, 2 * c.mlp, bias=False)
        self.down = nn.Linear(c.mlp, c.width, bias=False)

    def forward(self, x, cos, sin, cache=None, attention_mask=None, doc_spans=None):
        """x (B, T, C) -> (B, T, C); cos, sin: the rotations of the T positions."""
        B, T, _ = x.shape
        H, G, D = self.c.heads, self.c.kv_heads, self.c.head_dim
        qkv = self.qkv(self.norm1(x)).view(B, T, H + 2 * G, D)
        rope(qkv[:, :, :H + G], cos, sin, inplace=True)     # q and k lie side by side
        q, k, v = qkv.split((H, G, G), dim=2)               # (B, T, H or G, D)
        y = self_attention(q, k, v, self.c.window, cache, self.layer, attention_mask, doc_spans)
        x = x + self.out(y.reshape(B, T, H * D))
        return x + self.down(swiglu(self.gate_up(self.norm2(x))))      # silu(gate) * up, (B, T, F)


class Llama(nn.Module):
    """The decoder: embedding, blocks, norm, output head."""
    # what blocks keep for backward: None, "none", "attention", "full"; and whether on the host
    checkpoint, offload = None, False                       # kernels/checkpoint.py
    # llms/ has models of other kinds with this interface
    kind, table, can_capture = "llama", names.LLAMA, True   # decoding/cuda_graph.py

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.embed = nn.Embedding(c.vocab, c.width)
        self.blocks = nn.ModuleList(Block(c, i) for i in range(c.depth))
        self.norm = RMSNorm(c.width, c.eps)
        self.head = nn.Linear(c.width, c.vocab, bias=False)
        if c.tie_embeddings:
            self.head.weight = self.embed.weight

    def hidden(self, x, cache=None, position_ids=None, attention_mask=None, doc_spans=None):
        """Last hidden states (B, T, C), normed, of ids (B, T) or embeddings (B, T, C).

        position_ids (B, T): rotary positions; None: 0, 1, 2 ... from the cache's length on.
        attention_mask (B, T) bool: False where a token is padding (without a cache).
        doc_spans: kernels.attention.document_spans of the texts packed into each row (without a
        cache): each text sees itself alone and counts its positions from 0."""
        if not x.is_floating_point():
            x = self.embed(x)                               # ids -> (B, T, C)
        c = self.config
        if position_ids is None:
            start = cache.length if cache is not None else 0
            position_ids = torch.arange(start, start + x.shape[1], device=x.device)[None]   # (1, T)
            if doc_spans is not None:
                position_ids = position_ids - doc_spans[0]  # minus where each document begins
        cos, sin = rope_table(position_ids, c.head_dim, c.rope_theta, c.rope_scaling)
        if cache is None:
            x = checkpointed(self.blocks, x, cos, sin, None, attention_mask, doc_spans,
                             policy=self.checkpoint, offload=self.offload)
        else:       # no checkpointing with a cache: a recomputed block would write its keys twice
            for block in self.blocks:
                x = block(x, cos, sin, cache)
            cache.advance(x.shape[1])
        return self.norm(x)

    def forward(self, x, cache=None, position_ids=None, attention_mask=None):
        """ids (B, T) or embeddings (B, T, C) -> logits (B, T, V)."""
        return self.head(self.hidden(x, cache, position_ids, attention_mask))

    def next_logits(self, x, cache, position_ids=None, attention_mask=None):
        """Logits (B, V), fp32, of the token after the last one."""
        return self.head(self.hidden(x, cache, position_ids, attention_mask)[:, -1]).float()

    def predictions(self, x, labels, mask=None, doc_spans=None):
        """Hidden states (N, C) at the tokens before those with loss, and these tokens' ids (N).

        x (B, T, C); labels (B, T); mask (B, T): padding, at the end, is seen by none, so it is not
        needed here; doc_spans: see `hidden`."""
        hidden, targets = self.hidden(x, doc_spans=doc_spans)[:, :-1], labels[:, 1:]
        has_loss = targets != data.IGNORE
        return hidden[has_loss], targets[has_loss]

    def resize_embeddings(self, rows):
        """Room for more tokens: new rows of embedding and head are the mean of the old ones."""
        old, C = self.config.vocab, self.config.width
        self.config = replace(self.config, vocab=rows)
        layers = (self.embed,) if self.config.tie_embeddings else (self.embed, self.head)
        for layer in layers:
            weight = layer.weight.new_empty(rows, C)
            weight[:old] = layer.weight.data
            weight[old:] = layer.weight.data.float().mean(0)
            layer.weight = nn.Parameter(weight)
        if self.config.tie_embeddings:
            self.head.weight = self.embed.weight

    @classmethod
    def from_pretrained(cls, folder, dtype=None):
        """From a folder or hub id in the Hugging Face layout, in `dtype` (None: the file's own).

        Raises data.BadModel, data.Offline."""
        folder = checkpoints.resolve(folder)
        weights = checkpoints.load_weights(folder)
        config = Config(**configs.read_llama(folder, weights))
        with torch.device("meta"):                          # shapes without memory
            model = cls(config)
        table, ignore = names.llama(weights, config)
        return checkpoints.load_into(model, table, weights, ignore, dtype).eval()

    def save_pretrained(self, folder):
        """config.json and model.safetensors, as transformers reads them."""
        folders.save_llama(self, folder)


def main():
    """Continue a text by 40 tokens, without a cache: the whole row is read for every token."""
    toy = Path(__file__).parent / "toy/weights/llama"
    args = parse()
    folder = checkpoints.resolve(args.folder or toy)
    llama, tokenizer = Llama.from_pretrained(folder), data.Tokenizer(folder)
    ids = tokenizer.encode(args.text)
    print(f"{sum(p.numel() for p in llama.parameters()):,} weights; {len(ids)} tokens in")
    with torch.inference_mode():
        for _ in range(40):
            logits = llama(torch.tensor([ids]))             # (1, T, V)
            ids.append(int(logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos:
                break
    print(tokenizer.decode(ids))


if __name__ == "__main__":
    sys.exit(exit_status(main))
