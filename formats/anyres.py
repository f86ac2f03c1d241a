"""LLaVA-NeXT's pictures in tiles: which grid a picture gets, and the tiles that are cut from it.

Source: haotian-liu/LLaVA c121f04, llava/mm_utils.py (select_best_resolution, process_anyres_image)
and llava_arch.py (unpad_image). Units: pixels, except where patches are named."""
import math
from typing import NamedTuple

from PIL import Image


class AnyresGrid(NamedTuple):
    """How anyres cuts a picture; pairs are (width, height) except `unpadded`."""
    canvas: tuple       # pixels of the whole canvas
    tiles: tuple        # tiles across and down
    resized: tuple      # pixels of the picture in the middle of the canvas
    unpadded: tuple     # (rows, columns) of patch features left after the padding is cut
    tokens: int         # features in all: overview, rows × columns, one newline vector a row


ANYRES_GRIDS = (1, 2), (2, 1), (2, 2), (3, 1), (1, 3)       # tiles across and down, in 1.6's order
TRANSPOSED = tuple((b, a) for a, b in ANYRES_GRIDS)         # the same list as transformers reads it


def anyres_grid(width: int, height: int, size: int = 336, patches: int = 24,
                grids: tuple = ANYRES_GRIDS) -> AnyresGrid:
    """The LLaVA-NeXT grid of a picture (llava/mm_utils.py, llava_arch.py).

    patches: features along the side of one tile. grids: (tiles across, tiles down) to choose from;
    of equal fits the first wins. Official files list (width, height), transformers reads the same
    list as (height, width): pictures that fit two grids unscaled get a wide one there, a tall one
    here, unless grids=TRANSPOSED. quirk: an odd remainder leaves one padding row in, and a very
    thin picture can be left with no columns at all, only newlines."""
    def fit(canvas):
        """Most pixels kept, then least waste; of equals `max` takes the first in the list."""
        scale = min(canvas[0] / width, canvas[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - canvas[0] * canvas[1]

    W, H = max([(size * across, size * down) for across, down in grids], key=fit)
    if W / width < H / height:                  # as wide as the canvas, padded above and below
        resized = W, min(math.ceil(height * (W / width)), H)
    else:
        resized = min(math.ceil(width * (H / height)), W), H
    across, down = patches * W // size, patches * H // size        # patches of the canvas
    rows, columns = down, across
    if width / height > across / down:          # what is padding is cut off again, by halves
        rows -= 2 * ((down - int(height * (across / width))) // 2)
    else:
        columns -= 2 * ((across - int(width * (down / height))) // 2)
    tokens = patches ** 2 + rows * (columns + 1)
    return AnyresGrid((W, H), (W // size, H // size), resized, (rows, columns), tokens)


def cut_tiles(image, size: int, grids: tuple) -> list:
    """The overview and the tiles of a picture, row by row, each size x size."""
    grid = anyres_grid(*image.size, size, grids=grids)
    (W, H), (width, height) = grid.canvas, grid.resized
    canvas = Image.new("RGB", (W, H))           # quirk: black here, the mean colour in `pad`
    canvas.paste(image.resize((width, height)), ((W - width) // 2, (H - height) // 2))
    tiles = [image.resize((size, size))]        # quirk: squashed, not cropped or padded
    for y in range(0, H, size):
        for x in range(0, W, size):
            tiles.append(canvas.crop((x, y, x + size, y + size)))
    return tiles
