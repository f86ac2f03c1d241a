"""clip.py: turn an image into a row of patch vectors, and know which words they go with.

    pixels (B, 3, S, S) -> S/p x S/p patches -> one vector each      (B, P, C)
    a class token in front, learned positions, a norm               (B, 1+P, C)
    depth blocks of attention (all see all) and MLP

    picture  [cls] p1 p2 ... pP -> blocks ... -> block depth-1 -> last block -> norm, projection
                                                     |                                |
                                    LLaVA reads here: patches                 CLIP reads here: [cls]

Trained by contrast [CLIP] 2103.00020: among a batch of pictures and captions, find the pairs.
LLaVA takes the second-last block: the last one has gathered its findings into the class token.

CLIP details that load without an error and are wrong when missed: a norm *before* the blocks
(spelled pre_layrnorm in the files), QuickGELU instead of GELU, no bias in the patch embedding.
Checked against: transformers' CLIPModel (tests/test_parity.py).

The toy tower is trained by *late interaction* [FILIP] 2111.07783: a phrase of the caption scores
by its best patch, not by the class token. The pooled loss alone is won by colour and place, and
the patches, which are what LLaVA reads, lose the shape (README, "The parts").

EVA ViT-g/14 [EVA] 2211.07636, the eye of BLIP-2 and MiniGPT-4, is the same tower with other
settings; what a Q-Former is given has no tail:

            GELU    patches  norm before  k bias  tail                      eps    read
    CLIP    quick   no bias  yes          yes     last block, final norm    1e-5   patches
    EVA     exact   bias     no           zero    none                      1e-6   [cls] and patches

Letters: B batch, T tokens, P patches, C width, H heads, D head size, E shared width.
Alone: `python clip.py photo.jpg` prints the phrases nearest to a picture.
Next: llama.py, the decoder.
"""

import argparse
import json
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import data
from formats import configs
from formats.bert import toy_clip_tokenizer
from formats.checkpoints import dtype_name, export, load_into, resolve, save_weights
from formats.errors import exit_status
from formats.names import ZEROS
from formats.processors import Processor
from formats.strict_json import read_config
from formats.unused import POSITIONS
from kernels import attention, causal, checkpointed, full, gelu, layer_norm, quick_gelu


@dataclass(frozen=True)
class Config:
    """Sizes of one tower. Defaults are ViT-L/14's."""
    width: int = 1024
    depth: int = 24
    heads: int = 16
    mlp: int = 4096
    eps: float = 1e-5
    image_size: int = 224                # pixels of a side (picture tower)
    patch_size: int = 14
    vocab: int = 49408              # (text tower)
    context: int = 77
    eos_id: int | tuple = 49407        # ids of the token that closes a text, where it is read
    eva: bool = False               # the second row of the table above
    has_final_block: bool = True               # holds a block and a norm behind where bridges read

    @property
    def ends(self):
        """`end` as a tuple: a config.json may list several ids."""
        return self.eos_id if type(self.eos_id) is tuple else (self.eos_id,)


class LayerNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x):
        return layer_norm(x, self.weight, self.bias, self.eps)


class Block(nn.Module):
    """A pre-norm transformer block with biases, the same in both towers."""

    def __init__(self, c):
        super().__init__()
        self.heads, self.exact = c.heads, c.eva
        self.norm1 = LayerNorm(c.width, c.eps)
        self.qkv = nn.Linear(c.width, 3 * c.width)
        self.out = nn.Linear(c.width, c.width)
        self.norm2 = LayerNorm(c.width, c.eps)
        self.up = nn.Linear(c.width, c.mlp)
        self.down = nn.Linear(c.mlp, c.width)

    def forward(self, x, allow=full):
        B, T, C = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, C // self.heads).unbind(2)
        x = x + self.out(attention(q, k, v, allow).reshape(B, T, C))
        return x + self.down((gelu if self.exact else quick_gelu)(self.up(self.norm2(x))))


def block_names(at, **theirs):
    """{ours: theirs} of one block of theirs at `at`; {} is its number, a tuple is fused in ours."""
    return {f"blocks.{{}}.{ours}.{kind}": tuple(f"{at}{n}.{kind}" for n in name)
            if type(name) is tuple else f"{at}{name}.{kind}"
            for kind in ("weight", "bias") for ours, name in theirs.items()}


BLOCK_NAMES = block_names(                      # in both towers of CLIP
    "encoder.layers.{}.", norm1="layer_norm1", norm2="layer_norm2", up="mlp.fc1", down="mlp.fc2",
    qkv=tuple(f"self_attn.{p}_proj" for p in "qkv"), out="self_attn.out_proj")


def prefixed(names, ours, theirs):
    """The table with a prefix on either side."""
    return {ours + k: theirs + v if type(v) is str else tuple(theirs + x for x in v)
            for k, v in names.items()}


def interpolate_positions(position, side):
    """Learned positions (1+P, C) or (1, 1+P, C) for a square of side x side patches.

    The class token's stays, the grid is stretched as a picture would be: bicubic, corners not
    aligned, in fp32 (the official loader of EVA; transformers at run time)."""
    rows = position.detach().float().view(-1, position.shape[-1])
    old = round((len(rows) - 1) ** .5)
    grid = rows[1:].T.reshape(1, -1, old, old)                                # (1, C, old, old)
    grid = F.interpolate(grid, (side, side), mode="bicubic", align_corners=False)
    rows = torch.cat((rows[:1], grid[0].flatten(1).T)).to(position.dtype)
    return rows.view(*position.shape[:-2], *rows.shape)


class ViT(nn.Module):
    """The picture tower. A CLIP's has a tail, to hand it back: nothing here runs it."""
    NAMES = {
        "cls": "embeddings.class_embedding",
        "patch": "embeddings.patch_embedding.weight",
        "position": "embeddings.position_embedding.weight",
        "norm_pre.weight": "pre_layrnorm.weight",          # quirk: spelled so in every file
        "norm_pre.bias": "pre_layrnorm.bias",
        **BLOCK_NAMES,
        "norm_post.weight": "post_layernorm.weight",
        "norm_post.bias": "post_layernorm.bias",
    }
    EVA_NAMES = {
        "cls": "embeddings.class_embedding",
        "patch": "embeddings.patch_embedding.weight",
        "patch_bias": "embeddings.patch_embedding.bias",
        "position": "embeddings.position_embedding",
        **block_names("encoder.layers.{}.", norm1="layer_norm1", norm2="layer_norm2", up="mlp.fc1",
                      down="mlp.fc2", qkv="self_attn.qkv", out="self_attn.projection"),
    }
    # quirk: k has no bias there. Adding one number to all scores of a query changes no softmax.
    LAVIS_NAMES = {
        "cls": "visual_encoder.cls_token",
        "patch": "visual_encoder.patch_embed.proj.weight",
        "patch_bias": "visual_encoder.patch_embed.proj.bias",
        "position": "visual_encoder.pos_embed",
        **block_names("visual_encoder.blocks.{}.", norm1="norm1", norm2="norm2", up="mlp.fc1",
                      down="mlp.fc2", qkv="attn.qkv", out="attn.proj"),
        "blocks.{}.qkv.bias": ("visual_encoder.blocks.{}.attn.q_bias", ZEROS,
                               "visual_encoder.blocks.{}.attn.v_bias"),
    }
    IGNORE = {**POSITIONS,
              r"(text_model\.|text_projection|visual_projection|logit_scale).*":
                  "the half of CLIP that reads text"}
    checkpoint = None           # what blocks keep for backward: see kernels/checkpoint.py

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        patches, front = (c.image_size // c.patch_size) ** 2, (1,) * c.eva       # as the files have them
        self.cls = nn.Parameter(torch.randn(*front, *front, c.width) * c.width ** -0.5)
        self.patch = nn.Parameter(torch.randn(c.width, 3, c.patch_size, c.patch_size) * c.patch_size ** -1 * .58)
        self.patch_bias = nn.Parameter(torch.zeros(c.width)) if c.eva else None
        self.position = nn.Parameter(torch.randn(*front, 1 + patches, c.width) * .1)
        self.norm_pre = nn.Identity() if c.eva else LayerNorm(c.width, c.eps)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        self.norm_post = LayerNorm(c.width, c.eps) if c.has_final_block else None

    def names(self):
        """The weight table that fits this tower, in transformers' spelling."""
        table = self.EVA_NAMES if self.config.eva else self.NAMES
        return {k: v for k, v in table.items() if self.config.has_final_block or "norm_post" not in k}

    def without_final_block(self):
        """This tower without its tail, for a Q-Former, which has a norm of its own in that place
        (and in the files under that name). An EVA has none to lose. Returns self."""
        if self.config.has_final_block:
            self.config = replace(self.config, depth=self.config.depth - 1, has_final_block=False)
            self.blocks, self.norm_post = self.blocks[:-1], None
        return self

    def embed(self, pixels):
        """pixels (B, 3, S, S) -> (B, 1+P, C), ready for the blocks."""
        B, p, side = len(pixels), self.config.patch_size, self.config.image_size // self.config.patch_size
        if pixels.shape[1:] != (3, self.config.image_size, self.config.image_size):
            raise ValueError(f"pixels {tuple(pixels.shape)} do not fit a tower for (B, 3, "
                             f"{self.config.image_size}, {self.config.image_size}); use data.preprocess")
        x = pixels[:, :, :side * p, :side * p].view(B, 3, side, p, side, p)
        # a convolution with stride = size is one matrix product a patch
        x = x.permute(0, 2, 4, 1, 3, 5).reshape(B, side * side, 3 * p * p) @ self.patch.flatten(1).T
        x = x if self.patch_bias is None else x + self.patch_bias
        x = torch.cat((self.cls.to(x.dtype).expand(B, 1, -1), x), dim=1)       # (B, 1+P, C)
        return self.norm_pre(x + self.position)

    def forward(self, pixels):
        """pixels (B, 3, S, S) -> (B, 1+P, C), class first: what the second-last block of a CLIP, or
        the last of a tower without a tail, puts out."""
        blocks = self.blocks[:-1] if self.config.has_final_block else self.blocks
        return checkpointed(blocks, self.embed(pixels), policy=self.checkpoint)

    @torch.no_grad()
    def normalize_output_scale(self, pixels):
        """Scale the residual stream so that the second-last block's output has unit variance.

        Every block reads the stream through a norm, so scaling all that writes into it changes no
        answer. A tower trained by Muon comes out loud (26 x the toy's words), and what a bridge
        hands on too loudly, the language model's own additions cannot be heard over."""
        factor = 1 / self(pixels).std()
        for layer in (self.norm_pre, *(x for b in self.blocks for x in (b.out, b.down))):
            layer.weight.mul_(factor)
            layer.bias.mul_(factor)

    @classmethod
    def from_pretrained(cls, folder, dtype=None, image=None):
        """From a folder or hub id of a full CLIP, of its picture tower alone, or of a BLIP-2,
        InstructBLIP or LAVIS model, in `dtype` or, if None, the file's own; for pictures of `image`
        pixels a side, if that is given. Raises data.BadModel, data.Offline."""
        folder = resolve(folder)
        c, weights = read_config(folder), data.load_weights(folder)
        with torch.device("meta"):
            model = cls(Config(**configs.vision_tower(c)))
        Processor(folder, c.get("model_type")).aspect(model.config.image_size)
        prefix = next((p for p in ("vision_model.", "visual_encoder.")
                       if any(k.startswith(p) for k in weights)), "")
        ignore, names = dict(cls.IGNORE), prefixed(model.names(), "", prefix)
        if prefix == "visual_encoder.":
            names = cls.LAVIS_NAMES
        if not model.config.has_final_block and prefix:
            ignore |= {rf"(?!{re.escape(prefix)}).*": "not of the tower",
                       r"vision_model\.post_layernorm\..*": "ln_vision, which is not frozen with "
                       "the tower and has a place of its own before the Q-Former"}
        load_into(model, names, weights, ignore, dtype)
        if image and image != model.config.image_size:
            model.config = replace(model.config, image_size=image)
            model.config.check()
            model.position = nn.Parameter(interpolate_positions(model.position, image // model.config.patch_size))
        return model.eval()


class TextTower(nn.Module):
    """The text tower: causal, read where the text ends."""
    NAMES = {"token": "embeddings.token_embedding.weight",
             "position": "embeddings.position_embedding.weight", **BLOCK_NAMES,
             "norm.weight": "final_layer_norm.weight", "norm.bias": "final_layer_norm.bias"}
    checkpoint = None           # as in ViT

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.token = nn.Parameter(torch.randn(c.vocab, c.width) * .1)
        self.position = nn.Parameter(torch.randn(c.context, c.width) * .1)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        self.norm = LayerNorm(c.width, c.eps)

    def forward(self, ids):
        """ids (B, T) -> (B, C), the state at the first end token. ValueError if T is too long."""
        if ids.shape[1] > self.config.context:
            raise ValueError(f"a text of {ids.shape[1]} tokens; this CLIP has positions for "
                             f"{self.config.context}: cut the text, and keep its end token")
        x = self.token[ids] + self.position[:ids.shape[1]]
        x = checkpointed(self.blocks, x, causal, policy=self.checkpoint)
        # quirk: files that say eos_token_id 2 are from before the field was right; there the end
        # is the largest id of the text
        if self.config.ends == (2,):
            end = ids.argmax(1)
        else:
            end = torch.isin(ids, ids.new_tensor(self.config.ends)).int().argmax(1)
        return self.norm(x)[torch.arange(len(x)), end]


class CLIP(nn.Module):
    """Both towers and their projections into one space."""
    NAMES = {**prefixed(ViT.NAMES, "vision.", "vision_model."),
             **prefixed(TextTower.NAMES, "text.", "text_model."),
             "to_shared.weight": "visual_projection.weight",
             "text_to_shared.weight": "text_projection.weight", "scale": "logit_scale"}
    IGNORE = POSITIONS

    def __init__(self, vision, text, shared):
        super().__init__()
        self.vision, self.text = ViT(vision), TextTower(text)
        self.visual_projection = nn.Linear(vision.width, shared, bias=False)
        self.text_projection = nn.Linear(text.width, shared, bias=False)
        self.scale = nn.Parameter(torch.tensor(2.6592))        # ln(1 / 0.07)      [CLIP] 2.5

    def patches(self, pixels):
        """pixels -> (B, 1+P, E): class token and patches in the shared space, unit length."""
        x = self.vision.blocks[-1](self.vision(pixels))
        return F.normalize(self.visual_projection(self.vision.norm_post(x)), dim=-1)

    def encode_image(self, pixels):
        """pixels (B, 3, S, S) -> (B, E) unit vectors."""
        return self.patches(pixels)[:, 0]

    def encode_text(self, ids):
        """ids (B, T), padded behind the end token -> (B, E) unit vectors."""
        return F.normalize(self.text_projection(self.text(ids)), dim=-1)

    @classmethod
    def from_pretrained(cls, folder, dtype=None):
        """From a folder or hub id in the Hugging Face layout, in `dtype` or the file's own."""
        folder = resolve(folder)
        c = read_config(folder)
        vision, text, shared = configs.clip(c)
        with torch.device("meta"):
            model = cls(Config(**vision), Config(**text), shared)
        Processor(folder, "clip").aspect(model.vision.config.image_size)
        return load_into(model, cls.NAMES, data.load_weights(folder), cls.IGNORE, dtype).eval()

    def save_pretrained(self, folder):
        """config.json, preprocessor_config.json and model.safetensors, as transformers reads."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        shared = self.visual_projection.weight.shape[0]
        config = {"model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": shared,
                  "dtype": dtype_name(self.scale.dtype),
                  "vision_config": {**configs.vit_to_hf(self.vision.config), "projection_dim": shared},
                  "text_config": {**configs.vit_to_hf(self.text.config, text=True), "projection_dim": shared}}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_weights(folder, export(self, self.NAMES))


# ----------------------------------------------------------------------- the contrastive losses

def contrastive_loss(scores, truth, pairs):
    """Find the right one, both ways, among all that are not also right.

    scores (B, K): picture b with text k, temperature included; truth (B, K) bool: k is true of b;
    pairs (M, 2): which text stands with which picture. The other true ones are taken out of the
    denominator: without that, "a red star" would be pushed away from every other red star."""
    b, k = pairs[:, 0], pairs[:, 1]
    own = scores[b, k]
    masked = scores.masked_fill(truth, float("-inf"))
    to_text = torch.logsumexp(torch.cat((own[:, None], masked[b]), 1), 1) - own
    to_picture = torch.logsumexp(torch.cat((own[:, None], masked.T[k]), 1), 1) - own
    return (to_text.mean() + to_picture.mean()) / 2


def filip_scores(patches, phrases):
    """(B, P, E), (K, E) unit vectors -> (B, K): a phrase scores by its best patch. [FILIP]"""
    return (patches @ phrases.T).amax(dim=1)


def main(argv=None):
    """What of a few colours and shapes a picture's patches look like."""
    p = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False)
    p.add_argument("image", nargs="?", default=Path(__file__).parent / "tests/scene.png")
    shown = p.parse_args(argv).image
    toy = Path(__file__).parent / "toy/weights/clip"
    clip, ids_of = CLIP.from_pretrained(toy), toy_clip_tokenizer(toy)
    picture = data.load_image(shown)
    texts = [f"a {colour} {shape}" for colour in ("red", "green", "blue", "yellow", "purple")
             for shape in ("circle", "square", "triangle", "star", "cross")]
    with torch.inference_mode():
        dots = data.preprocess(picture, clip.vision.config.image_size, "pad")
        vectors = clip.patches(dots)                                           # (1, 1+P, E)
        close = filip_scores(vectors[:, 1:], clip.encode_text(ids_of(texts)))[0]
    print(f"pixels {tuple(dots.shape)} -> patches {tuple(clip.vision(dots).shape)}")
    for i in close.topk(6).indices.tolist():
        print(f"{float(close[i]):.3f}  {texts[i]}")


if __name__ == "__main__":
    sys.exit(exit_status(main))
