"""exercises.of_vision: exercises 1 to 3, from pixels to the first block of a vision tower.

For each: the project's own function in the exercise's signature, small inputs, classic mistakes.
"""
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import clip
import data
from exercises.checking import Exercise
from kernels import quick_gelu

ROOT = Path(__file__).parents[1]


def bare_tower(weight, image_size):
    """A ViT that only cuts and multiplies: class token and positions 0, no norm."""
    C, _, p, _ = weight.shape
    tower = clip.ViT(clip.Config(width=C, depth=1, heads=1, mlp=1, image_size=image_size,
                                 patch_size=p))
    tower.norm_pre, tower.patch.data = nn.Identity(), weight
    tower.cls.data.zero_()
    tower.position.data.zero_()
    return tower


# ------------------------------------------------------------------------------ 1: patches

def embed_patches(pixels, weight):
    return bare_tower(weight, pixels.shape[-1]).embed(pixels)[:, 1:]


def patch_cases():
    rng = torch.Generator().manual_seed(1)
    shapes = ((2, 8, 4, 5), (1, 9, 3, 4), (1, 10, 4, 6))        # B, S, p, C; the last has a border
    return [(torch.randn(B, 3, S, S, generator=rng), torch.randn(C, 3, p, p, generator=rng))
            for B, S, p, C in shapes]


def tiles(pixels, p):
    """(B, 3, side, p, side, p): rows of patches, rows inside, columns of patches, columns."""
    side = pixels.shape[-1] // p
    return pixels[:, :, :side * p, :side * p].reshape(len(pixels), 3, side, p, side, p)


def patches_by(order):
    """Patches with the axes of `tiles` in another order."""
    def embed(pixels, weight):
        x = tiles(pixels, weight.shape[-1]).permute(order)
        return x.reshape(len(pixels), -1, weight[0].numel()) @ weight.flatten(1).T
    return embed


def uncut(pixels, weight):
    p, side = weight.shape[-1], pixels.shape[-1] // weight.shape[-1]
    x = pixels[:, :, :side * p, :side * p]
    return x.reshape(len(pixels), -1, weight[0].numel()) @ weight.flatten(1).T


def untransposed(pixels, weight):
    p = weight.shape[-1]
    x = F.unfold(pixels, p, stride=p)                               # (B, 3 p p, P)
    return x.reshape(len(x), x.shape[2], -1) @ weight.flatten(1).T


def whole_border(pixels, weight):
    """The last rows and columns instead of the first, where a border is left over."""
    used = pixels.shape[-1] // weight.shape[-1] * weight.shape[-1]
    return embed_patches(pixels[:, :, -used:, -used:].contiguous(), weight)


PATCHES = Exercise(
    1, "ex01_patches.py", ("embed_patches",), "ViT.embed in clip.py", embed_patches, patch_cases,
    (("the picture is reshaped, not cut: a row of pixels runs through several patches, so reshape "
      "to (B, 3, side, p, side, p) and permute before the last reshape", uncut),
     ("the colours stand before the patches when they are reshaped: permute them behind",
      patches_by((0, 1, 2, 4, 3, 5))),
     ("unfold gives (B, 3 * p * p, P): transpose(1, 2) before the product", untransposed),
     ("the patches come column by column: reading order is row by row",
      patches_by((0, 4, 2, 1, 3, 5))),
     ("inside a patch colour comes last: the weight's order is colour, row, column",
      patches_by((0, 2, 4, 3, 5, 1))),
     ("inside a patch rows and columns are exchanged", patches_by((0, 2, 4, 1, 5, 3))),
     ("the vectors stand in columns, (B, C, P): what a convolution returns needs flatten(2) and "
      "transpose(1, 2)", lambda pixels, weight: embed_patches(pixels, weight).transpose(1, 2)),
     ("the border is cut off at the top and left: pixels that fill no patch are those at the "
      "right and at the bottom", whole_border)),
    ("vectors",))


# ---------------------------------------------------------------------- 2: class token, positions

def add_positions(patches, cls, position):
    """`ViT.embed` on pixels that are the patch vectors: patches of one pixel, weight 1."""
    B, P, C = patches.shape                             # C is 3, and P a square number
    side = int(P ** .5)
    tower = bare_tower(torch.eye(3).view(3, 3, 1, 1), side)
    tower.cls.data, tower.position.data = cls, position
    return tower.embed(patches.transpose(1, 2).reshape(B, C, side, side))


def position_cases():
    rng = torch.Generator().manual_seed(2)
    return [(torch.randn(B, P, 3, generator=rng), torch.randn(3, generator=rng),
             torch.randn(1 + P, 3, generator=rng)) for B, P in ((2, 4), (1, 9))]


def row(patches, cls):
    return torch.cat((cls.expand(len(patches), 1, -1), patches), 1)


def class_last(patches, cls, position):
    return torch.cat((patches, cls.expand(len(patches), 1, -1)), 1) + position


def class_without_position(patches, cls, position):
    return row(patches + position[1:], cls)


def positions_before_class(patches, cls, position):
    return row(patches + position[:-1], cls)


POSITIONS = Exercise(
    2, "ex02_positions.py", ("add_positions",), "ViT.embed in clip.py", add_positions,
    position_cases,
    (("the class token stands last: it comes first, and LLaVA drops row 0", class_last),
     ("off by one: the patches have the positions 0 to P - 1, and row 0 is the class token's: put "
      "it in front before you add", positions_before_class),
     ("the class token has no position: row 0 of `position` is its own", class_without_position),
     ("there are no positions", lambda patches, cls, position: row(patches, cls)),
     ("there is no class token in front of the patches",
      lambda patches, cls, position: patches + position[1:]),
     ("the class token is missing: row 0 is its position alone",
      lambda patches, cls, position: row(patches, 0 * cls) + position)),
    ("row",))


# ------------------------------------------------------------------------------ 3: QuickGELU

def gelu_cases():
    return [(torch.linspace(-6, 6, 49),), (torch.randn(2, 3, 4, generator=torch.Generator(
        ).manual_seed(3)),)]


@torch.inference_mode()
def change_by_gelu():
    """How far the toy's patch vectors move when the tower runs with the exact GELU."""
    tower = clip.ViT.from_pretrained(ROOT / "toy/weights/clip")
    image = data.load_image(ROOT / "tests/scene.png")
    pixels = data.preprocess(image, tower.config.image_size)
    right = tower(pixels)
    for block in tower.blocks:
        block.exact_gelu = True
    moved = (tower(pixels) - right).norm() / right.norm()
    return (f"With GELU in its place the patch vectors of the toy's tower move by {moved:.1%} of "
            "their length, without an error.")


QUICK_GELU = Exercise(
    3, "ex03_quick_gelu.py", ("quick_gelu",), "quick_gelu in kernels/swiglu.py", quick_gelu,
    gelu_cases,
    (("that is GELU, x times the normal distribution: CLIP was trained with x * sigmoid(1.702 x), "
      "and its features are others", F.gelu),
     ("that is GELU in its tanh form: CLIP was trained with x * sigmoid(1.702 x)",
      lambda x: F.gelu(x, approximate="tanh")),
     ("that is SiLU: the 1.702 inside the sigmoid is missing", F.silu),
     ("the factor x is missing: that is the sigmoid alone", lambda x: torch.sigmoid(1.702 * x)),
     ("the 1.702 stands outside the sigmoid, too: only its argument has it",
      lambda x: 1.702 * x * torch.sigmoid(1.702 * x)),
     ("the 1.702 stands outside the sigmoid: it belongs to its argument",
      lambda x: 1.702 * x * torch.sigmoid(x)),
     ("that is ReLU", torch.relu)),
    ("y",), remark=change_by_gelu)

EXERCISES = (PATCHES, POSITIONS, QUICK_GELU)
