"""clip.py: turn an image into a row of patch vectors, and know which texts it goes with.

    pixels (B, 3, S, S) -> S/p x S/p patches -> one vector each      (B, P, C)
    a class token in front, learned positions, a norm               (B, 1+P, C)
    depth blocks of attention (every token sees every token) and MLP

    image  [cls] p1 p2 ... pP -> blocks ... -> block depth-1 -> last block -> norm, projection
                                                    |                                |
                                   LLaVA reads here: patches                 CLIP reads here: [cls]

CLIP is trained by contrast: in a batch of images and captions, find the pairs [CLIP] 2103.00020.
LLaVA reads the output of the second-last block. The last block moves what it found into the class
token, and its patches keep less local information.

Four details give wrong features, and no error, when they are missed: a norm *before* the blocks
(pre_layrnorm in the files, officially misspelled), QuickGELU, x sigmoid(1.702 x), instead of GELU,
no bias at the patches, the class token first. Checked against transformers (tests/test_parity.py).

The toy tower is trained by *late interaction* [FILIP] 2111.07783: a phrase of the caption scores by
its best patch, not by the class token. With the class token alone a tiny tower can pair images and
captions by colour and place, and the patches, which LLaVA reads, lose the shape (docs/weights.md).

EVA ViT-g/14 [EVA] 2211.07636 is the vision tower of BLIP-2 and MiniGPT-4: the same network with
other settings. A Q-Former reads EVA's block 39; BLIP-2 leaves out block 40 and the norm behind it:

            GELU    patches  norm before  bias of k  a block behind it  eps    read
    CLIP    quick   no bias  yes          yes        yes, and a norm    1e-5   patches
    EVA     exact   bias     no           always 0   no                 1e-6   [cls] and patches

Letters: B batch, T tokens, P patches, C width, H heads, D head size, E width of the shared space.
Alone: `python clip.py photo.jpg` prints the phrases that fit an image best.
Next: llama.py, the decoder.
"""

import argparse
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import data
from formats import checkpoints, configs, folders, names, unused
from formats.bert import toy_clip_tokenizer
from formats.errors import exit_status
from kernels import attention, causal, checkpointed, full, gelu, layer_norm, quick_gelu


@dataclass(frozen=True)
class Config:
    """Sizes of one tower. Defaults are ViT-L/14's."""
    width: int = 1024               # C
    depth: int = 24                 # number of blocks
    heads: int = 16                 # H
    mlp: int = 4096                 # width inside the MLP
    eps: float = 1e-5               # of the norms
    image_size: int = 224           # S, pixels of a side (vision tower)
    patch_size: int = 14            # p, pixels of a side (vision tower)
    vocab: int = 49408              # (text tower)
    context: int = 77               # longest text in tokens (text tower)
    eos_id: int | tuple = 49407     # the tokens that end a text; the text is read there
    eva: bool = False               # the second row of the table above
    has_final_block: bool = True    # False: the last block is the one that is read

    @property
    def eos_ids(self):
        """eos_id as a tuple: a config.json may list several."""
        return self.eos_id if isinstance(self.eos_id, tuple) else (self.eos_id,)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * weight + bias, over the last dimension."""

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
        self.heads, self.exact_gelu = c.heads, c.eva
        self.norm1 = LayerNorm(c.width, c.eps)
        self.qkv = nn.Linear(c.width, 3 * c.width)      # q, k and v in one matrix product
        self.out = nn.Linear(c.width, c.width)
        self.norm2 = LayerNorm(c.width, c.eps)
        self.up = nn.Linear(c.width, c.mlp)
        self.down = nn.Linear(c.mlp, c.width)

    def forward(self, x, allow=full):
        B, T, C = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, C // self.heads)
        q, k, v = qkv.unbind(2)                                        # (B, T, H, D) each
        x = x + self.out(attention(q, k, v, allow).reshape(B, T, C))
        act = gelu if self.exact_gelu else quick_gelu
        return x + self.down(act(self.up(self.norm2(x))))


# ---------------------------------------------------------------------------- the vision tower

def interpolate_positions(position, side):
    """Learned positions (1+P, C) or (1, 1+P, C) -> the same for an image of side x side patches.
    The class token keeps its own. The grid of the others is resized like a picture: bicubic,
    corners not aligned, in fp32, as the official loader of EVA does."""
    rows = position.detach().float().view(-1, position.shape[-1])             # (1+P, C)
    old = round((len(rows) - 1) ** .5)
    grid = rows[1:].T.reshape(1, -1, old, old)                                # (1, C, old, old)
    grid = F.interpolate(grid, (side, side), mode="bicubic", align_corners=False)
    rows = torch.cat((rows[:1], grid[0].flatten(1).T)).to(position.dtype)     # (1+side*side, C)
    return rows.view(*position.shape[:-2], *rows.shape)


class ViT(nn.Module):
    """The vision tower. CLIP's last block and final norm are loaded only so that they can be saved
    again: `forward` does not run them."""
    checkpoint = None               # what blocks keep for backward: see kernels/checkpoint.py

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        patches = (c.image_size // c.patch_size) ** 2
        lead = (1,) * c.eva         # EVA's files have dimensions of size 1 in front
        self.cls = nn.Parameter(torch.randn(*lead, *lead, c.width) * c.width ** -0.5)
        self.patch = nn.Parameter(torch.randn(c.width, 3, c.patch_size, c.patch_size)
                                  * c.patch_size ** -1 * .58)
        self.patch_bias = nn.Parameter(torch.zeros(c.width)) if c.eva else None
        self.position = nn.Parameter(torch.randn(*lead, 1 + patches, c.width) * .1)
        self.norm_pre = nn.Identity() if c.eva else LayerNorm(c.width, c.eps)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        self.norm_post = LayerNorm(c.width, c.eps) if c.has_final_block else None

    def without_final_block(self):
        """Drop CLIP's last block and final norm, for a Q-Former, which has a norm of its own in
        their place (and in the files under that name). Returns self."""
        if self.config.has_final_block:
            depth = self.config.depth - 1
            self.config = replace(self.config, depth=depth, has_final_block=False)
            self.blocks, self.norm_post = self.blocks[:-1], None
        return self

    def embed(self, pixels):
        """pixels (B, 3, S, S) -> (B, 1+P, C), the input of the first block."""
        c, B = self.config, len(pixels)
        p, side = c.patch_size, c.image_size // c.patch_size
        configs.check_pixels(c, pixels)
        x = pixels[:, :, :side * p, :side * p]          # a border smaller than a patch is unused
        x = x.view(B, 3, side, p, side, p).permute(0, 2, 4, 1, 3, 5)
        # a convolution whose stride is its size is one matrix product per patch
        x = x.reshape(B, side * side, 3 * p * p) @ self.patch.flatten(1).T     # (B, P, C)
        if self.patch_bias is not None:
            x = x + self.patch_bias
        x = torch.cat((self.cls.to(x.dtype).expand(B, 1, -1), x), dim=1)       # (B, 1+P, C)
        return self.norm_pre(x + self.position)

    def forward(self, pixels):
        """pixels (B, 3, S, S) -> (B, 1+P, C), class token first: the output of CLIP's second-last
        block, or of the last block of a tower without a final one."""
        blocks = self.blocks[:-1] if self.config.has_final_block else self.blocks
        return checkpointed(blocks, self.embed(pixels), policy=self.checkpoint)

    def resize(self, image_size):
        """Take images of `image_size` pixels a side from now on. Returns self; raises BadModel."""
        self.config = replace(self.config, image_size=image_size)
        configs.check_vit(asdict(self.config))
        side = image_size // self.config.patch_size
        self.position = nn.Parameter(interpolate_positions(self.position, side))
        return self

    @classmethod
    def from_pretrained(cls, folder, dtype=None):
        """From a folder or hub id of a CLIP, of its vision tower alone, or of a BLIP-2,
        InstructBLIP or LAVIS model, in `dtype` (None: the file's own)."""
        folder = checkpoints.resolve(folder)
        weights = checkpoints.load_weights(folder)
        with torch.device("meta"):                      # shapes without memory
            model = cls(Config(**configs.read_vision_tower(folder)))
        table, ignore = names.vision_tower(weights, model.config)
        return checkpoints.load_into(model, table, weights, ignore, dtype).eval()


class TextTower(nn.Module):
    """The text tower: causal, and read where the text ends."""
    checkpoint = None               # as in ViT

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.token = nn.Parameter(torch.randn(c.vocab, c.width) * .1)
        self.position = nn.Parameter(torch.randn(c.context, c.width) * .1)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        self.norm = LayerNorm(c.width, c.eps)

    def forward(self, ids):
        """ids (B, T) -> (B, C), the state at the first end token."""
        configs.check_text_length(self.config, ids)
        x = self.token[ids] + self.position[:ids.shape[1]]                     # (B, T, C)
        x = checkpointed(self.blocks, x, causal, policy=self.checkpoint)
        # quirk: files with eos_token_id 2 are older than that key: a text ends at its largest id
        if self.config.eos_ids == (2,):
            end = ids.argmax(1)                                                # (B,)
        else:
            end = torch.isin(ids, ids.new_tensor(self.config.eos_ids)).int().argmax(1)
        return self.norm(x)[torch.arange(len(x)), end]


class CLIP(nn.Module):
    """Both towers and their projections into one shared space."""

    def __init__(self, vision, text, shared):
        """vision, text: Config; shared: E."""
        super().__init__()
        self.vision, self.text = ViT(vision), TextTower(text)
        self.visual_projection = nn.Linear(vision.width, shared, bias=False)
        self.text_projection = nn.Linear(text.width, shared, bias=False)
        # the inverse temperature is learned as a logarithm; it starts at ln(1 / 0.07) [CLIP] 2.5
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))

    def patches(self, pixels):
        """pixels (B, 3, S, S) -> (B, 1+P, E): class token and patches, unit vectors."""
        x = self.vision.blocks[-1](self.vision(pixels))         # here the last block runs
        x = self.visual_projection(self.vision.norm_post(x))                   # (B, 1+P, E)
        return F.normalize(x, dim=-1)

    def encode_image(self, pixels):
        """pixels (B, 3, S, S) -> (B, E) unit vectors."""
        return self.patches(pixels)[:, 0]

    def encode_text(self, ids):
        """ids (B, T), padded behind the end token -> (B, E) unit vectors."""
        return F.normalize(self.text_projection(self.text(ids)), dim=-1)

    @classmethod
    def from_pretrained(cls, folder, dtype=None):
        """From a folder or hub id in the Hugging Face layout, in `dtype` (None: the file's own)."""
        folder = checkpoints.resolve(folder)
        vision, text, shared = configs.read_clip(folder)
        with torch.device("meta"):
            model = cls(Config(**vision), Config(**text), shared)
        weights = checkpoints.load_weights(folder)
        return checkpoints.load_into(model, names.CLIP, weights, unused.POSITIONS, dtype).eval()

    def save_pretrained(self, folder):
        """config.json and model.safetensors, as transformers reads them."""
        folders.save_clip(self, folder)


# ----------------------------------------------------------------------- the contrastive losses

def contrastive_loss(scores, is_true, pairs):
    """Find the right one, both ways, among all that are not also right.

    scores (B, K): image b with text k, over the temperature; is_true (B, K) bool: k is true of b;
    pairs (M, 2): (b, k) that stand together. Other true texts are taken out of the denominator:
    otherwise "a red star" would be pushed away from every other red star."""
    b, k = pairs[:, 0], pairs[:, 1]
    positive = scores[b, k]                                                    # (M,)
    negatives = scores.masked_fill(is_true, float("-inf"))                     # (B, K)
    over_texts = torch.cat((positive[:, None], negatives[b]), 1)               # (M, 1+K)
    over_images = torch.cat((positive[:, None], negatives.T[k]), 1)            # (M, 1+B)
    to_text = torch.logsumexp(over_texts, 1) - positive
    to_image = torch.logsumexp(over_images, 1) - positive
    return (to_text.mean() + to_image.mean()) / 2


def filip_scores(patches, phrases):
    """(B, P, E), (K, E) unit vectors -> (B, K): a phrase scores by its best patch. [FILIP]"""
    return (patches @ phrases.T).amax(dim=1)


def main(argv=None):
    """Print which of a few colours and shapes fit an image best."""
    parser = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False)
    parser.add_argument("image", nargs="?", default=Path(__file__).parent / "tests/scene.png")
    image = data.load_image(parser.parse_args(argv).image)
    folder = Path(__file__).parent / "toy/weights/clip"
    clip, tokenize = CLIP.from_pretrained(folder), toy_clip_tokenizer(folder)
    phrases = []
    for colour in ("red", "green", "blue", "yellow", "purple"):
        for shape in ("circle", "square", "triangle", "star", "cross"):
            phrases.append(f"a {colour} {shape}")
    with torch.inference_mode():
        pixels = data.preprocess(image, clip.vision.config.image_size, "pad")  # (1, 3, S, S)
        patches = clip.patches(pixels)[:, 1:]                                  # (1, P, E)
        scores = filip_scores(patches, clip.encode_text(tokenize(phrases)))[0]
    print(f"pixels {tuple(pixels.shape)} -> patches {tuple(clip.vision(pixels).shape)}")
    for i in scores.topk(6).indices.tolist():
        print(f"{float(scores[i]):.3f}  {phrases[i]}")


if __name__ == "__main__":
    sys.exit(exit_status(main))
