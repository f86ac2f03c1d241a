"""llama.py: a LLaMA decoder that takes embeddings as well as token ids, with its KV cache.

    ids (B, T) -> embed -> x (B, T, C)      or x comes in ready made: a picture's vectors do
    depth times:   x += attention(RMSNorm(x))        causal, RoPE, grouped keys and values
                                                     (Mistral-7B-v0.1: the last 4,096 keys only)
                   x += SwiGLU-MLP(RMSNorm(x))
    RMSNorm -> head -> logits (B, T, V)

What differs from the 2017 transformer: norms come before the blocks and divide by the root mean
square only; positions are rotations of q and k (kernels/rope.py); the MLP is gated; no biases.
Checked against: transformers' LlamaForCausalLM (tests/test_parity.py).
Left out: dropout (LLaMA has none), tensor parallelism.
[LLaMA] 2302.13971 section 2.2.  [Induction] 2209.11895.

Letters: B batch, T query-side tokens, S key-side tokens, C width, H heads, G key/value heads,
D head size, F MLP width, V vocabulary.
Alone: `python llama.py "The red star"` continues a text with the shipped toy model.
Next: projector.py, which puts a picture's vectors between the words.
"""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

import data
from formats import configs
from formats.checkpoints import (
    dtype_name,
    export,
    load_into,
    resolve,
    save_weights,
)
from formats.names import fused_rows
from formats.strict_json import read_config
from formats.unused import head_is_embedding
from formats.unused import llama as unused_tensors
from kernels import (
    attention,
    checkpointed,
    decode,
    rms_norm,
    rope,
    rope_table,
    sliding_window,
    swiglu,
)


@dataclass(frozen=True)
class Config:
    """Sizes of a decoder. Defaults are Llama-2-7B's, which old hub configs leave out."""
    vocab: int = 32000
    width: int = 4096
    depth: int = 32
    heads: int = 32
    kv_heads: int = 32
    mlp: int = 11008
    eps: float = 1e-6               # Hugging Face's default; Llama-2 and Vicuna-1.5 files say 1e-5
    rope_theta: float = 10000.0
    context: int = 2048
    tie_embeddings: bool = False
    head_size: int = 0                   # size of a head; 0: width / heads, as in all but a few
    rope_scaling: tuple | None = None    # of rotary positions, see kernels/rope.py
    window: int | None = None       # keys that a query sees, its own included; None: all before it
    bos: int | None = 1             # kept for the file; the tokenizer says what is used
    eos: int | tuple | None = 2     # the same; Llama-3 has several

    @property
    def head_dim(self):
        return self.head_size or self.width // self.heads

    def rule(self, S):
        """Which mask attention has over S keys: inside the window, as without one, it is causal."""
        if self.window is None or S <= self.window:
            return {}                               # causal is what attention and decode begin with
        return {"allow": sliding_window, "n": self.window}


class KVCache:
    """Keys and values of the positions already seen, (B, capacity, G, D) a layer: the memory is
    taken once, and a token writes its own place only.

    `keep` (B, capacity) is False where a row's prompt was padded on the left; None: nowhere.
    How much is written the host knows, `length`, or after `hold` the device alone: one token at a
    time goes to place `at` (1,), row b sees the first `end[b]` places, and all of them are shown,
    so that from step to step no shape and no address changes (generate.py: Step)."""

    def __init__(self, config, batch, capacity, like, attention_mask=None):
        shape = (config.depth, batch, capacity, config.kv_heads, config.head_dim)
        self.k = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.v = torch.empty_like(self.k)
        self.length, self.at, self.end = 0, None, None
        self.attention_mask = None
        if attention_mask is not None and not attention_mask.all():         # asked once a prompt, not once a token
            self.attention_mask = torch.ones(batch, capacity, dtype=torch.bool, device=like.device)
            self.attention_mask[:, :attention_mask.shape[1]] = attention_mask

    def hold(self):
        """From here on places are counted on the device."""
        self.at = torch.full((1,), self.length, device=self.k.device)
        self.end = torch.full((self.k.shape[1],), self.length + 1, dtype=torch.int32,
                              device=self.k.device)
        self.length = None                                  # nobody on the host may go by it now

    def advance(self, T):
        """All layers have written T places."""
        if self.end is None:
            self.length += T
        else:
            self.at += T
            self.end += T

    def reorder(self, rows):
        """Row i becomes what row rows[i] was: beams go on from their parents."""
        if len(rows) != self.k.shape[1]:
            self.k, self.v = self.k[:, rows], self.v[:, rows]
        elif rows.tolist() != list(range(len(rows))):       # most steps: all stay where they are
            self.k[:, :, :self.length] = self.k[:, rows, :self.length]
            self.v[:, :, :self.length] = self.v[:, rows, :self.length]

    def update(self, layer, k, v):
        """Store (B, T, G, D) behind what is there; returns all (B, S, G, D)."""
        if self.end is not None:                            # T is 1, or this raises
            self.k[layer].index_copy_(1, self.at, k)
            self.v[layer].index_copy_(1, self.at, v)
            return self.k[layer], self.v[layer]
        end = self.length + k.shape[1]
        if end > self.k.shape[2]:
            raise ValueError(f"cache: {end} positions, room for {self.k.shape[2]}; "
                             "make it with a larger capacity")
        self.k[layer, :, self.length:end] = k
        self.v[layer, :, self.length:end] = v
        return self.k[layer, :, :end], self.v[layer, :, :end]


class RMSNorm(nn.Module):
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
        B, T, _ = x.shape
        H, G, D = self.c.heads, self.c.kv_heads, self.c.head_dim
        qkv = self.qkv(self.norm1(x)).view(B, T, H + 2 * G, D)
        rope(qkv[:, :, :H + G], cos, sin, inplace=True)            # q and k, heads side by side
        q, k, v = qkv.split((H, G, G), dim=2)
        start = 0
        if cache is not None:
            start = cache.length
            k, v = cache.update(self.layer, k, v)                  # (B, S, G, D)
            attention_mask = None if cache.attention_mask is None else cache.attention_mask[:, :k.shape[1]]
        rule = self.c.rule(k.shape[1])
        if cache is not None and cache.end is not None:
            y = decode(q, k, v, attention_mask, cache.end, **rule)
        elif cache is not None and T == 1 and not torch.is_grad_enabled():
            y = decode(q, k, v, attention_mask, **rule)   # one query against a cache has a kernel of its own
        else:
            y = attention(q, k, v, **rule, start=start, attention_mask=attention_mask, doc_spans=doc_spans)
        x = x + self.out(y.reshape(B, T, H * D))
        return x + self.down(swiglu(self.gate_up(self.norm2(x))))


class Llama(nn.Module):
    # ours: theirs; {} is the layer, a tuple is concatenated
    NAMES = {
        "embed.weight": "model.embed_tokens.weight",
        "blocks.{}.norm1.weight": "model.layers.{}.input_layernorm.weight",
        "blocks.{}.qkv.weight": ("model.layers.{}.self_attn.q_proj.weight",
                                 "model.layers.{}.self_attn.k_proj.weight",
                                 "model.layers.{}.self_attn.v_proj.weight"),
        "blocks.{}.out.weight": "model.layers.{}.self_attn.o_proj.weight",
        "blocks.{}.norm2.weight": "model.layers.{}.post_attention_layernorm.weight",
        "blocks.{}.gate_up.weight": ("model.layers.{}.mlp.gate_proj.weight",
                                     "model.layers.{}.mlp.up_proj.weight"),
        "blocks.{}.down.weight": "model.layers.{}.mlp.down_proj.weight",
        "norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
    }
    IGNORE = {r".*rotary_emb\.inv_freq": "recomputed from rope_theta"}     # see `ignored`
    # what blocks keep for backward: None, "none", "attention", "full"; and whether on the host
    checkpoint, offload = None, False           # kernels/checkpoint.py

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.embed = nn.Embedding(c.vocab, c.width)
        self.blocks = nn.ModuleList(Block(c, i) for i in range(c.depth))
        self.norm = RMSNorm(c.width, c.eps)
        self.head = nn.Linear(c.width, c.vocab, bias=False)
        if c.tie_embeddings:
            self.head.weight = self.embed.weight

    def names(self):
        """The weight table; a tied model has no head of its own in the file."""
        return {k: v for k, v in self.NAMES.items() if not (self.config.tie_embeddings and k[:4] == "head")}

    def resize_embeddings(self, rows):
        """Room for more tokens: new embedding and head rows are the mean of the old ones."""
        old, C = self.config.vocab, self.config.width
        self.config = replace(self.config, vocab=rows)
        for layer in ((self.embed,) if self.config.tie_embeddings else (self.embed, self.head)):
            wide = layer.weight.new_empty(rows, C)
            wide[:old] = layer.weight.data
            wide[old:] = layer.weight.data.float().mean(0)
            layer.weight = nn.Parameter(wide)
        if self.config.tie_embeddings:
            self.head.weight = self.embed.weight

    def hidden(self, x, cache=None, position_ids=None, attention_mask=None, doc_spans=None):
        """Last hidden states (B, T, C), normed, of ids (B, T) or embeddings (B, T, C).

        positions (B, T): rotary positions, 0, 1, 2 ... from the cache's length if None.
        keep (B, T) bool: False where a token is padding (without a cache).
        documents: kernels.attention.document_spans of the texts in each row (without a cache): each sees
        itself alone and counts its positions from 0."""
        if not x.is_floating_point():
            x = self.embed(x)
        start = cache.length if cache is not None else 0
        if position_ids is None:
            position_ids = torch.arange(start, start + x.shape[1], device=x.device)[None]
            position_ids = position_ids if doc_spans is None else position_ids - doc_spans[0]
        c = self.config
        cos, sin = rope_table(position_ids, c.head_dim, c.rope_theta, c.rope_scaling)
        if cache is None:
            x = checkpointed(self.blocks, x, cos, sin, None, attention_mask, doc_spans, policy=self.checkpoint,
                    offload=self.offload)
        else:                                   # nothing runs twice here: a cache would remember it
            for block in self.blocks:
                x = block(x, cos, sin, cache)
            cache.advance(x.shape[1])
        return self.norm(x)

    def forward(self, x, cache=None, position_ids=None, attention_mask=None):
        """ids (B, T) or embeddings (B, T, C) -> logits (B, T, V)."""
        return self.head(self.hidden(x, cache, position_ids, attention_mask))

    def next_logits(self, x, cache, position_ids=None, attention_mask=None):
        """Logits (B, V), fp32, of what follows the last position."""
        return self.head(self.hidden(x, cache, position_ids, attention_mask)[:, -1]).float()

    @classmethod
    def from_pretrained(cls, folder, dtype=None):
        """From a folder or hub id, Hugging Face layout, in `dtype` or, if None, the file's own.

        Raises data.BadModel, data.Offline."""
        folder = resolve(folder)
        config, weights = Config(**configs.llama_from_hf(read_config(folder))), data.load_weights(folder)
        embed, head = cls.NAMES["embed.weight"], cls.NAMES["head.weight"]
        config = cls.settle_tie(config, weights, embed, head)
        with torch.device("meta"):
            model = cls(config)
        names, ignore = model.names(), cls.ignored(config)
        if config.tie_embeddings and embed not in weights:
            names["embed.weight"] = head                # the one name a tied file has it under
        elif config.tie_embeddings:
            ignore[re.escape(head)] = "tied: the embedding once more, see settle_tie"
        return load_into(model, names, weights, ignore, dtype).eval()

    @staticmethod
    def settle_tie(config, weights, embed, head):
        """The config, no longer tied where the file's head is not its embedding. embed, head: their
        names in the file."""
        if config.tie_embeddings and not head_is_embedding(weights, embed, head):
            return replace(config, tie_embeddings=False)
        return config

    @classmethod
    def ignored(cls, config):
        """IGNORE with its checks: inv_freq must be what config says, stretched or (as files from
        before 2023-12 have it) not yet."""
        return unused_tensors(config)

    def save_pretrained(self, folder):
        """config.json and model.safetensors, as transformers reads them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {**configs.llama_to_hf(self.config), "dtype": dtype_name(self.head.weight.dtype)}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_weights(folder, export(self, self.names(), fused_rows(self.config)))


if __name__ == "__main__":
    import sys
    toy = Path(__file__).parent / "toy/weights/llama"
    llama, words = Llama.from_pretrained(toy), data.Tokenizer(toy)
    ids = words.encode(sys.argv[1] if len(sys.argv) > 1 else "This picture shows two objects on")
    print(f"{sum(p.numel() for p in llama.parameters()):,} weights; {len(ids)} tokens in")
    with torch.inference_mode():
        for _ in range(40):
            ids.append(int(llama(torch.tensor([ids]))[0, -1].argmax()))
    print(words.decode(ids))
