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
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

import data
from formats.checkpoints import head_is_embedding, rotary
from kernels import attention, decode, rms_norm, rope, rope_table, run, sliding_window, swiglu


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
    theta: float = 10000.0
    context: int = 2048
    tied: bool = False
    head: int = 0                   # size of a head; 0: width / heads, as in all but a few
    scaling: tuple | None = None    # of rotary positions, see kernels/rope.py
    window: int | None = None       # keys that a query sees, its own included; None: all before it
    bos: int | None = 1             # kept for the file; the tokenizer says what is used
    eos: int | tuple | None = 2     # the same; Llama-3 has several

    @property
    def head_dim(self):
        return self.head or self.width // self.heads

    @classmethod
    def from_hf(cls, c):
        """From the dict of a Hugging Face config.json (or its `text_config`).

        Fields left out, as old hub configs do, get the defaults that transformers documents."""
        if type(c) is not dict:
            raise data.BadModel("config.json: the language model's settings must be an object; "
                                "take the config.json of the weights")
        kind = c.get("model_type", "llama")
        if kind not in ("llama", "mistral") or c.get("hidden_act", "silu") != "silu" or any(
                c.get(key, False) for key in ("attention_bias", "mlp_bias")):
            raise data.BadModel(f"config.json: model_type {kind!r}, a hidden_act other than silu, "
                                "or biases: not a LLaMA; give a LLaMA or Mistral folder")
        d, mistral = cls(), kind == "mistral"
        heads = c.get("num_attention_heads", d.heads)
        # as transformers does: a rope_scaling takes the place of rope_parameters
        rotary = c.get("rope_scaling") or c.get("rope_parameters") or {}
        context = c.get("max_position_embeddings", 2 ** 17 if mistral else d.context)
        scaling = cls.rope_scaling(rotary, context)
        if scaling and scaling[0] == "linear":
            context = cls.stretched(rotary, context)
        if any(x.get("partial_rotary_factor") not in (None, 1) for x in (c, rotary)):
            raise data.BadModel("config.json: partial_rotary_factor must be 1, a LLaMA turns all "
                                "of a head; take another model")
        eos = c.get("eos_token_id", d.eos)
        made = cls(c.get("vocab_size", d.vocab), c.get("hidden_size", d.width),
                   c.get("num_hidden_layers", d.depth), heads,
                   c.get("num_key_value_heads", 8 if mistral else None) or heads,
                   c.get("intermediate_size", 14336 if mistral else d.mlp),
                   c.get("rms_norm_eps", d.eps),
                   c.get("rope_theta", d.theta), context,
                   c.get("tie_word_embeddings", False), c.get("head_dim") or 0, scaling,
                   c.get("sliding_window", 4096) if mistral else None,
                   c.get("bos_token_id", d.bos), tuple(eos) if type(eos) is list else eos)
        made.check()
        made = replace(made, theta=rotary.get("rope_theta", made.theta))    # this one goes first
        made.check()
        return replace(made, head=0) if made.head * heads == made.width else made

    @staticmethod
    def rope_scaling(c, context):
        """`scaling` from the object rope_scaling (old files) or rope_parameters (new ones)."""
        if type(c) is not dict or any(type(value) is dict for value in c.values()):
            raise data.BadModel(f"config.json: rope_scaling or rope_parameters {str(c)[:80]} must "
                                "be one object of numbers; take the config.json of the weights")
        kind = c.get("rope_type", c.get("type", "default"))
        if kind == "default":
            return None
        if kind not in ("linear", "llama3"):
            raise data.BadModel(f"config.json: rotary positions scaled by {kind!r} are not known "
                                "here, only linear and llama3; take another model")
        wanted = ("factor",) if kind == "linear" else ("factor", "low_freq_factor",
                                                       "high_freq_factor")
        values = [c.get(key) for key in wanted]
        values += [c.get("original_max_position_embeddings", context)] * (kind == "llama3")
        if not all(type(v) in (int, float) and 0 < v < 2 ** 24 for v in values) or (
                kind == "llama3" and not values[1] < values[2]):
            raise data.BadModel(f"config.json: scaled rotary positions need {', '.join(wanted)} as "
                                "positive numbers; take the config.json of the weights")
        return (kind, *values)

    @staticmethod
    def stretched(c, context):
        """The context of a model with linear scaling: max_position_embeddings is the length before,
        and factor times as many positions are turned into it. Vicuna-16k: 4,096 · 4. A file that
        names the length before apart may give the one after, too: the larger is right."""
        before = c.get("original_max_position_embeddings", context)
        if type(before) is not int or type(context) is not int:
            return context                                  # `check` refuses it
        return max(context, int(before * c["factor"]))

    def check(self):
        """BadModel before any memory is taken, if the numbers cannot be a model's."""
        for name, low, high in (("vocab", 1, 2 ** 20), ("width", 2, 2 ** 16), ("depth", 1, 2 ** 9),
                                ("heads", 1, 2 ** 10), ("kv_heads", 1, 2 ** 10),
                                ("mlp", 1, 2 ** 18), ("context", 1, 2 ** 24)):
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise data.BadModel(f"config.json: {name} = {value!r} is not a whole number from "
                                    f"{low} to {high}; take the config.json of the weights")
        if self.window is not None and (type(self.window) is not int
                                        or not 1 <= self.window <= 2 ** 24):
            raise data.BadModel(f"config.json: sliding_window = {self.window!r} is not null or a "
                                "whole number from 1 on; take the config.json of the weights")
        ids = (self.bos, *(self.eos if type(self.eos) is tuple else (self.eos,)))
        if not all(i is None or type(i) is int and i >= 0 for i in ids):
            raise data.BadModel("config.json: bos_token_id must be a whole number, eos_token_id "
                                "one or a list of them; take the config.json of the weights")
        if type(self.head) is not int or not 0 <= self.head <= 2 ** 12 or (
                not self.head and self.width % self.heads or self.heads % self.kv_heads
                or self.head_dim % 2):
            raise data.BadModel(f"config.json: width {self.width}, heads {self.heads}, key/value "
                                f"heads {self.kv_heads} and head_dim {self.head or None} do not "
                                "fit together; take the config.json of the weights")
        if (not all(type(v) in (int, float) and 0 < v < math.inf for v in (self.eps, self.theta))
                or type(self.tied) is not bool):
            raise data.BadModel("config.json: rms_norm_eps and rope_theta must be positive, "
                                "tie_word_embeddings true or false; take the config.json of the "
                                "weights")

    def to_hf(self):
        """The dict that transformers writes for this model. A Mistral without a window is written
        as a LLaMA: it is one."""
        kind, *values = self.scaling or ("default",)
        keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        rotary = {"rope_theta": self.theta, "rope_type": kind, **dict(zip(keys, values))}
        context = self.context
        if kind == "linear" and values[0] > 1:      # the length before; see `stretched`
            context = math.ceil(context / values[0] - 1e-6)
        name = "Llama" if self.window is None else "Mistral"
        return {"model_type": name.lower(), "architectures": [f"{name}ForCausalLM"],
                **({} if self.window is None else {"sliding_window": self.window}),
                "vocab_size": self.vocab, "hidden_size": self.width,
                "num_hidden_layers": self.depth, "num_attention_heads": self.heads,
                "num_key_value_heads": self.kv_heads, "intermediate_size": self.mlp,
                "rms_norm_eps": self.eps, "rope_theta": self.theta, "hidden_act": "silu",
                "rope_parameters": rotary, "head_dim": self.head_dim,
                **({"rope_scaling": rotary} if self.scaling else {}),
                "max_position_embeddings": context, "tie_word_embeddings": self.tied,
                "attention_bias": False, "mlp_bias": False, "bos_token_id": self.bos,
                "eos_token_id": list(self.eos) if type(self.eos) is tuple else self.eos}

    def rule(self, S):
        """Which mask attention has over S keys: inside the window, as without one, it is causal."""
        if self.window is None or S <= self.window:
            return {}                               # causal is what attention and decode begin with
        return {"allow": sliding_window, "n": self.window}


class Cache:
    """Keys and values of the positions already seen, (B, capacity, G, D) a layer: the memory is
    taken once, and a token writes its own place only.

    `keep` (B, capacity) is False where a row's prompt was padded on the left; None: nowhere.
    How much is written the host knows, `length`, or after `hold` the device alone: one token at a
    time goes to place `at` (1,), row b sees the first `end[b]` places, and all of them are shown,
    so that from step to step no shape and no address changes (generate.py: Step)."""

    def __init__(self, config, batch, capacity, like, keep=None):
        shape = (config.depth, batch, capacity, config.kv_heads, config.head_dim)
        self.k = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.v = torch.empty_like(self.k)
        self.length, self.at, self.end = 0, None, None
        self.keep = None
        if keep is not None and not keep.all():         # asked once a prompt, not once a token
            self.keep = torch.ones(batch, capacity, dtype=torch.bool, device=like.device)
            self.keep[:, :keep.shape[1]] = keep

    def hold(self):
        """From here on places are counted on the device."""
        self.at = torch.full((1,), self.length, device=self.k.device)
        self.end = torch.full((self.k.shape[1],), self.length + 1, dtype=torch.int32,
                              device=self.k.device)
        self.length = None                                  # nobody on the host may go by it now

    def grow(self, T):
        """All layers have written T places."""
        if self.end is None:
            self.length += T
        else:
            self.at += T
            self.end += T

    def pick(self, rows):
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

    def forward(self, x, cos, sin, cache=None, keep=None, documents=None):
        B, T, _ = x.shape
        H, G, D = self.c.heads, self.c.kv_heads, self.c.head_dim
        qkv = self.qkv(self.norm1(x)).view(B, T, H + 2 * G, D)
        rope(qkv[:, :, :H + G], cos, sin, inplace=True)            # q and k, heads side by side
        q, k, v = qkv.split((H, G, G), dim=2)
        start = 0
        if cache is not None:
            start = cache.length
            k, v = cache.update(self.layer, k, v)                  # (B, S, G, D)
            keep = None if cache.keep is None else cache.keep[:, :k.shape[1]]
        rule = self.c.rule(k.shape[1])
        if cache is not None and cache.end is not None:
            y = decode(q, k, v, keep, cache.end, **rule)
        elif cache is not None and T == 1 and not torch.is_grad_enabled():
            y = decode(q, k, v, keep, **rule)   # one query against a cache has a kernel of its own
        else:
            y = attention(q, k, v, **rule, start=start, keep=keep, documents=documents)
        x = x + self.out(y.reshape(B, T, H * D))
        return x + self.down(swiglu(self.gate_up(self.norm2(x))))


class LoRA(nn.Module):
    """A frozen linear layer, and for each of its parts i (q, k and v are three) a trained addition:

        y_i = W_i x + (α / r) B_i A_i x        A_i (r, C), B_i (C_i, r), B_i = 0 at first

    One layer a part is what the official runs have, and what [LoRA] 2106.09685 says: here the A_i
    lie in rows on top of each other, one product for all, and each B_i reads its own r of the
    results. Official: α = 2 r. Left out: dropout of what A reads, 0.05 there: with it a step is no
    function of its inputs, and what runs again in backward draws other numbers."""

    def __init__(self, linear, sizes, rank):
        super().__init__()
        self.weight, self.sizes, self.scale = linear.weight, sizes, 2.0
        C = linear.in_features
        # as large as the first values of a linear layer of PyTorch, which the official ones are too
        self.a = nn.Parameter(self.weight.new_empty(len(sizes) * rank, C).uniform_(-1, 1) / C ** .5)
        self.b = nn.Parameter(self.weight.new_zeros(sum(sizes), rank))

    def forward(self, x):
        low = (self.scale * nn.functional.linear(x, self.a)).chunk(len(self.sizes), -1)
        more = [nn.functional.linear(l, b) for l, b in zip(low, self.b.split(self.sizes))]
        return nn.functional.linear(x, self.weight) + torch.cat(more, -1)

    @torch.no_grad()
    def merged(self):
        """The one linear layer that does the same."""
        pairs = zip(self.b.float().split(self.sizes), self.a.float().chunk(len(self.sizes)))
        one = nn.Linear(*self.weight.shape[::-1], bias=False, device="meta")
        wide = self.weight.float() + self.scale * torch.cat([b @ a for b, a in pairs])
        one.weight = nn.Parameter(wide.to(self.weight.dtype))
        return one


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
        if c.tied:
            self.head.weight = self.embed.weight

    def names(self):
        """The weight table; a tied model has no head of its own in the file."""
        return {k: v for k, v in self.NAMES.items() if not (self.config.tied and k[:4] == "head")}

    def split_sizes(self, name):
        """Rows of the tensors that a fused weight of ours is made of."""
        c = self.config
        if "gate_up" in name:
            return [c.mlp, c.mlp]
        return [c.heads * c.head_dim, c.kv_heads * c.head_dim, c.kv_heads * c.head_dim]

    def grow(self, rows):
        """Room for more tokens: new embedding and head rows are the mean of the old ones."""
        old, C = self.config.vocab, self.config.width
        self.config = replace(self.config, vocab=rows)
        for layer in ((self.embed,) if self.config.tied else (self.embed, self.head)):
            wide = layer.weight.new_empty(rows, C)
            wide[:old] = layer.weight.data
            wide[old:] = layer.weight.data.float().mean(0)
            layer.weight = nn.Parameter(wide)
        if self.config.tied:
            self.head.weight = self.embed.weight

    def adapt(self, rank, seed=0):
        """LoRA in every linear layer of the blocks; of this model only that trains from now on."""
        self.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for block in self.blocks:
                for name in ("qkv", "out", "gate_up", "down"):
                    linear, several = getattr(block, name), name in ("qkv", "gate_up")
                    sizes = self.split_sizes(name) if several else [linear.out_features]
                    setattr(block, name, LoRA(linear, sizes, rank))

    def merge(self):
        """What `adapt` put there becomes part of the weights; returns self."""
        for block in self.blocks:
            for name, layer in list(block.named_children()):
                if isinstance(layer, LoRA):
                    setattr(block, name, layer.merged())
        return self

    def hidden(self, x, cache=None, positions=None, keep=None, documents=None):
        """Last hidden states (B, T, C), normed, of ids (B, T) or embeddings (B, T, C).

        positions (B, T): rotary positions, 0, 1, 2 ... from the cache's length if None.
        keep (B, T) bool: False where a token is padding (without a cache).
        documents: kernels.attention.packed of the texts in each row (without a cache): each sees
        itself alone and counts its positions from 0."""
        if not x.is_floating_point():
            x = self.embed(x)
        start = cache.length if cache is not None else 0
        if positions is None:
            positions = torch.arange(start, start + x.shape[1], device=x.device)[None]
            positions = positions if documents is None else positions - documents[0]
        c = self.config
        cos, sin = rope_table(positions, c.head_dim, c.theta, c.scaling)
        if cache is None:
            x = run(self.blocks, x, cos, sin, None, keep, documents, policy=self.checkpoint,
                    offload=self.offload)
        else:                                   # nothing runs twice here: a cache would remember it
            for block in self.blocks:
                x = block(x, cos, sin, cache)
            cache.grow(x.shape[1])
        return self.norm(x)

    def forward(self, x, cache=None, positions=None, keep=None):
        """ids (B, T) or embeddings (B, T, C) -> logits (B, T, V)."""
        return self.head(self.hidden(x, cache, positions, keep))

    @classmethod
    def from_pretrained(cls, folder, dtype=None):
        """From a folder or hub id, Hugging Face layout, in `dtype` or, if None, the file's own.

        Raises data.BadModel, data.Offline."""
        folder = data.resolve(folder)
        config, weights = Config.from_hf(data.read_config(folder)), data.load_weights(folder)
        embed, head = cls.NAMES["embed.weight"], cls.NAMES["head.weight"]
        config = cls.settle_tie(config, weights, embed, head)
        with torch.device("meta"):
            model = cls(config)
        names, ignore = model.names(), cls.ignored(config)
        if config.tied and embed not in weights:
            names["embed.weight"] = head                # the one name a tied file has it under
        elif config.tied:
            ignore[re.escape(head)] = "tied: the embedding once more, see settle_tie"
        return data.fill(model, names, weights, ignore, dtype).eval()

    @staticmethod
    def settle_tie(config, weights, embed, head):
        """The config, no longer tied where the file's head is not its embedding. embed, head: their
        names in the file."""
        if config.tied and not head_is_embedding(weights, embed, head):
            return replace(config, tied=False)
        return config

    @classmethod
    def ignored(cls, config):
        """IGNORE with its checks: inv_freq must be what config says, stretched or (as files from
        before 2023-12 have it) not yet."""
        tables = (rope_table(torch.ones(1), config.head_dim, config.theta, scaling)
                  for scaling in (config.scaling, None))
        angles = [torch.atan2(sin, cos)[0] for cos, sin in tables]      # of position 1: theta
        return cls.IGNORE | rotary(*angles)

    def save_pretrained(self, folder):
        """config.json and model.safetensors, as transformers reads them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {**self.config.to_hf(), "dtype": data.dtype_name(self.head.weight.dtype)}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        data.save_weights(folder, data.export(self, self.names()))


@torch.no_grad()
def start_copying(model, seed=0):
    """Starting values from which a small model learns to look things up in minutes.

    "What colour is the star? The star is ..." has to find "star" in the text and copy the word
    before it. That takes two layers: one writes into every position which words stand before it,
    the next matches against those notes. Large models grow this circuit, the induction head
    [Induction], suddenly, after a long plateau of loss. A toy of one million weights was still on
    that plateau ("some colour that is present") after three million tokens from a vaguer layout
    than this one, so it starts with the circuit laid out. Only starting values: everything trains,
    and the model is plain LLaMA.

    The width is four heads wide, C = 4 D, and each quarter of the residual stream gets a meaning:

        x = [ word | note 1 | note 2 | note 3 ]          note i: the word i tokens back
                                                          (note 3: those 3 and 4 back)

    layer 0    head i looks i+1 back and copies `word` there into its note. Position alone decides:
               channel 0 of every word is constant, and for a constant k, q = R(-i) k makes
               q · R(j-i) k largest at the distance i
    layer 1-3  a head compares one quarter of its own position with one of all others, in channels
               that hardly rotate, and copies a quarter from where they agree into `word`, where
               the output head reads it:   (note 1, word) -> note 1   is   "star is" -> "red"
    """
    c, D = model.config, model.config.head_dim
    dice = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.dim() == 2:
            p.normal_(0, p.shape[1] ** -0.5, generator=dice)
    for block in model.blocks:
        block.out.weight.mul_((2 * c.depth) ** -0.5)
        block.down.weight.mul_((2 * c.depth) ** -0.5)
    model.embed.weight[:, :D].normal_(0, 2, generator=dice)        # rms 1 over the whole width
    model.embed.weight[:, D:] = 0
    model.embed.weight[:, 0] = 0
    model.embed.weight.mul_(2 * (D - 1) ** .5 / model.embed.weight.norm(dim=1, keepdim=True))
    model.embed.weight[:, 0] = 2            # equal lengths, so that RMSNorm leaves it a constant
    quarter = [slice(i * D, (i + 1) * D) for i in range(4)]        # word, note 1, note 2, note 3
    theta = c.theta ** (-torch.arange(D // 2) * 2 / D)
    fast, slow = torch.arange(4), torch.nonzero(theta < .005)[:, 0]
    slow = torch.cat((slow, slow + D // 2))                        # both halves of a rotated pair

    def rows(block, part, head):                # a view of one head's q, k or v rows
        at = ({"q": 0, "k": c.heads, "v": c.heads + c.kv_heads}[part] + head) * D
        block.qkv.weight[at:at + D] = 0
        return block.qkv.weight[at:at + D]

    first = model.blocks[0]
    for head in range(4):                       # note 3 holds two words: 3 and 4 back
        note = min(head, 2) + 1
        back = (head + 1) * theta[fast]
        rows(first, "k", head)[fast, 0] = 3.5
        q = rows(first, "q", head)
        q[fast, 0], q[fast + D // 2, 0] = 3.5 * torch.cos(back), -3.5 * torch.sin(back)
        rows(first, "v", head)[:, quarter[0]] = torch.eye(D)
        first.out.weight[:, quarter[head]] = 0
        first.out.weight[quarter[note], quarter[head]] = torch.eye(D)
    # (query, key, copied) quarters, for notes like "large red star top left; ..."
    looks = (((1, 1, 0), (2, 2, 0),         # "red star is" -> top: where the same words went before
              (0, 1, 0), (1, 2, 0)),        # "large red" -> star: the induction head, by two words
             ((1, 0, 1), (1, 0, 2),         # "star is" -> red, and -> large
              (2, 0, 3), (3, 1, 3)),        # "top left is a" -> large red: one note, by both words
             ((0, 0, 0), (1, 0, 0),         # the same among vectors that hold all words of a note
              (2, 0, 0), (3, 0, 0)))        # in one place, as a picture's do: find it, copy it
    for block, plan in zip(model.blocks[1:4], looks):
        for head, (asks, finds, copies) in enumerate(plan):
            rows(block, "q", head)[slow, D * asks + slow] = 1.75
            rows(block, "k", head)[slow, D * finds + slow] = 1.75
            rows(block, "v", head)[:, quarter[copies]] = torch.eye(D)
            block.out.weight[:, quarter[head]] = 0
            block.out.weight[quarter[0], quarter[head]] = torch.eye(D)
    model.head.weight.copy_(model.embed.weight / c.width ** 0.5)   # a copied word is a likely word


if __name__ == "__main__":
    import sys
    toy = Path(__file__).parent / "weights/toy/llama"
    llama, words = Llama.from_pretrained(toy), data.Tokenizer(toy)
    ids = words.encode(sys.argv[1] if len(sys.argv) > 1 else "This picture shows two objects on")
    print(f"{sum(p.numel() for p in llama.parameters()):,} weights; {len(ids)} tokens in")
    with torch.inference_mode():
        for _ in range(40):
            ids.append(int(llama(torch.tensor([ids]))[0, -1].argmax()))
    print(words.decode(ids))
