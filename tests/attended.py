"""Does a model look at the thing that it names?

    python tests/attended.py [MODEL] [SCENES]       a table over layers, 200 scenes

The true description of a toy scene is read by the model; at the token that ends a thing's name, the
attention to the patches inside that thing's box (mean a patch) stands against the patches outside,
and, as a control, against the inside of the same box mirrored through the picture's middle."""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from decoding.attention_map import attention_to_patches, mean_inside_box
from decoding.flags import DEFAULT_MODEL
from decoding.prompt import build_prompt
from projector import VLM
from toy.texts import DESCRIBE, description
from toy.world import draw, make_scene


def named(tokens, words, names):
    """{name: number of the token that ends its first mention}; names not found are left out."""
    text, ends = words.decode(tokens), {}
    for name in names:
        if (at := text.find(name)) >= 0:
            ends[name] = next(n for n in range(len(tokens))
                              if len(words.decode(tokens[:n + 1])) >= at + len(name))
    return ends


def attended(model, scenes, layer):
    """Means over all things named: (inside the box, outside, inside the mirrored box)."""
    found, side = [], int(model.patches ** .5)
    ids = build_prompt([DESCRIBE[0]], model.template, model.tokenizer)
    for scene in scenes:
        tokens = model.tokenizer.encode(description(scene), bos=False)
        pixels = model.pixels(draw(scene))
        grids = attention_to_patches(model, ids, tokens, pixels, layer).view(-1, side, side)
        ends = named(tokens, model.tokenizer, [t.full for t in scene.things])
        for t in scene.things:
            if t.full in ends:
                x1, y1, x2, y2 = t.box
                grid = grids[ends[t.full]]
                found.append((*mean_inside_box(grid, t.box), mean_inside_box(
                    grid, (1 - x2, 1 - y2, 1 - x1, 1 - y1))[0]))
    return [statistics.fmean(column) for column in zip(*found)]


if __name__ == "__main__":
    model = VLM.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else DEFAULT_MODEL)
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 200
    scenes = [make_scene(i, "test") for i in range(count)]
    print(f"{count} scenes; attention a patch, times the number of patches")
    for layer in range(model.llm.config.depth):
        a, b, c = (model.patches * x for x in attended(model, scenes, layer))
        print(f"layer {layer}: inside {a:.3f}, outside {b:.3f}, {a / b:.1f} times; "
              f"mirrored box {c:.3f}")
