"""docs.drawing.scenes: which patches of a toy picture show which object."""
from dataclasses import replace

import numpy as np
import torch

import data
from evaluate.toy import held_out_scenes
from toy.world import draw

COVERED = .3            # share of a patch's pixels that an object must change


def object_patches(scene, thing, side):
    """(side * side,) bool: the patches in which the picture without the thing would be another."""
    rest = tuple(t for t in scene.things if t is not thing)
    one, other = (np.asarray(draw(s), int) for s in (scene, replace(scene, things=rest)))
    changed = torch.from_numpy((one != other).any(-1)).float()                 # (S, S)
    p = len(changed) // side
    shares = changed.view(side, p, side, p).mean((1, 3)).flatten()             # (side * side,)
    return shares >= min(COVERED, float(shares.max()))


def measured_scenes(count):
    """Held-out scenes with 1, 2, 3, 4, 1 ... objects."""
    return held_out_scenes(count)


def pixels_of(model, scenes):
    """(n, 3, S, S)."""
    return torch.cat([data.preprocess(draw(s), model.image_size, model.aspect) for s in scenes])
