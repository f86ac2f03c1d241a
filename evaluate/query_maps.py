"""evaluate.query_maps: what the queries of a Q-Former look at, as a picture.

    python -m evaluate.query_maps tests/queries.png [--scene 111] [--queries 0,3,5]

Each picture of the sheet is the scene once more, bright at the patches that one query attends to in
its last cross-attention (the mean over its heads; the class token is left out). Without --queries
those are shown whose maps differ most from the mean map.
"""
import argparse
import sys

import torch
from PIL import Image, ImageDraw

import data
from decoding.attention_map import as_seen, GAP, SIDE, TITLE
from formats.errors import exit_status, UsageError
from qformer import Blip2Stage1, itc
from toy.world import draw, make_scene


@torch.inference_mode()
def cross_attention(model, pixels):
    """(Q, P): each query's attention to the patches of one picture, in the last block that looks.

    model: a Blip2Stage1; pixels (1, 3, S, S). The class token is left out, so a row sums
    to less than 1."""
    cross = [block.cross for block in model.qformer.blocks if block.cross is not None][-1]
    seen = []
    handle = cross.register_forward_pre_hook(lambda part, inputs: seen.append(inputs))
    try:
        model.qformer(model.ln_vision(model.encode_vision(pixels)), allow=itc)
    finally:
        handle.remove()
    (x, features), H = seen[0][:2], cross.heads                     # (1, Q, C), (1, 1+P, Cv)
    q = cross.q(x)[0].unflatten(-1, (H, -1))                        # (Q, H, D)
    k = cross.kv(features)[0].unflatten(-1, (2, H, -1))[:, 0]       # (1+P, H, D)
    scores = torch.einsum("qhd,phd->hqp", q, k) * q.shape[-1] ** -.5
    return scores.softmax(-1).mean(0)[:, 1:]                        # without the class token


def most_different(maps, number):
    """Numbers of so many queries: each time the one whose map is farthest from those chosen."""
    chosen = [int((maps - maps.mean(0)).norm(dim=1).argmax())]
    while len(chosen) < min(number, len(maps)):
        chosen.append(int(torch.cdist(maps, maps[chosen]).amin(1).argmax()))
    return sorted(chosen)


def sheet(picture, maps, names):
    """PIL image: the picture, and beside it once for each map (P,), bright where that is high."""
    bright = picture.resize((SIDE, SIDE))
    dark = Image.blend(bright, Image.new("RGB", bright.size), .75)
    page = Image.new("RGB", ((1 + len(maps)) * (SIDE + GAP), SIDE + TITLE), "white")
    pen, side = ImageDraw.Draw(page), int(maps.shape[1] ** .5)
    page.paste(bright, (4, 18))
    pen.text((4, 4), "the scene", fill="black")
    for i, (row, name) in enumerate(zip(maps, names), 1):
        light = Image.fromarray((row / row.max() * 255).byte().view(side, side).numpy())
        light = light.resize(bright.size, Image.Resampling.BILINEAR)
        page.paste(Image.composite(bright, dark, light), (i * (SIDE + GAP) + 4, 18))
        pen.text((i * (SIDE + GAP) + 4, 4), name, fill="black")
    return page


def main():
    """Draw what a few queries look at."""
    parser = argparse.ArgumentParser(description="What each query looks at.", allow_abbrev=False)
    parser.add_argument("out", help="a PNG to draw")
    parser.add_argument("--model", default="toy/weights/qformer")
    parser.add_argument("--scene", type=int, default=111, help="a held-out scene of three objects")
    parser.add_argument("--queries", help="their numbers, with commas (default: six)")
    args = parser.parse_args()
    model = Blip2Stage1.from_pretrained(args.model)
    picture = draw(make_scene(args.scene, "test", 3), 256)
    pixels = data.preprocess(picture, model.image_size, "squash")
    maps = cross_attention(model, pixels)
    numbers = most_different(maps, 6)
    if args.queries:
        words = args.queries.split(",")
        if not all(word.isdigit() and int(word) < len(maps) for word in words):
            raise UsageError(f"--queries {args.queries}: the model has queries 0 to "
                             f"{len(maps) - 1}; give some of them, with commas")
        numbers = [int(word) for word in words]
    sheet(as_seen(pixels[0]), maps[numbers], [f"query {n}" for n in numbers]).save(args.out)
    print(f"{args.out} written: queries {', '.join(map(str, numbers))} of {len(maps)}")


if __name__ == "__main__":
    sys.exit(exit_status(main))
