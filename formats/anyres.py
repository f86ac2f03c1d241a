"""TODO"""

import math
from typing import NamedTuple


class AnyresGrid(NamedTuple):
    """How anyres cuts a picture; pairs are (width, height) except `unpadded`."""
    best: tuple         # pixels of the canvas
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
    def fit(side):
        # Most pixels kept, then least waste, then first in the list.
        scale = min(side[0] / width, side[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - side[0] * side[1]
    W, H = best = max(((size * a, size * b) for a, b in grids), key=fit)
    if W / width < H / height:
        resized = W, min(math.ceil(height * (W / width)), H)
    else:
        resized = min(math.ceil(width * (H / height)), W), H
    columns, rows = across, down = patches * W // size, patches * H // size
    if width / height > across / down:
        rows -= 2 * ((down - int(height * (across / width))) // 2)
    else:
        columns -= 2 * ((across - int(width * (down / height))) // 2)
    return AnyresGrid(best, (W // size, H // size), resized, (rows, columns),
                patches ** 2 + rows * (columns + 1))
