"""decoding/attention_map.py: which patches did each word of an answer attend to?

    attention_to_patches    (tokens, P): the attention of every token of the answer to every patch
    attention_to_pictures   (tokens, n, P): the same for n pictures in one talk
    tokens_by_word          which tokens make which word
    draw                    the picture once for each word, bright where its attention is high

The attention is computed again, in one pass over the prompt and the finished answer: while the
answer is written nothing is kept and nothing is slowed down."""

import math

import torch
from PIL import Image, ImageDraw

import data
from decoding.streaming import inner_decode, whole_groups
from formats.errors import note, UsageError, UserError
from kernels import mask_rule, rope, rope_table
from kernels.attention import visible

SIDE, GAP, TITLE = 168, 8, 24       # pixels: a picture of the sheet, between two, above each


def check_model(model, layer):
    """Raises UsageError for models whose pictures are no grid of patches, and for no such layer."""
    if model.projector_type == "qformer" or model.aspect == "anyres":
        raise UsageError("an attention map needs a model that reads a picture as one grid of "
                         "patches: LLaVA or LLaVA-1.5, no Q-Former and no tiles")
    depth = model.llm.config.depth
    if layer is not None and not 0 <= layer < depth:
        raise UsageError(f"--layer {layer}: the model has layers 0 to {depth - 1}")


def attention_weights(c, block, x, cos, sin, hidden):
    """(n, T): the last n positions' attention to all T in one block, the mean over heads.

    c: the llama.Config; x (1, T, C): the block's input; hidden (n, T) bool: not attended to"""
    T, n = x.shape[1], len(hidden)
    H, G, D = c.heads, c.kv_heads, c.head_dim
    qkv = block.qkv(block.norm1(x)).view(1, T, H + 2 * G, D)
    rope(qkv[:, :, :H + G], cos, sin, inplace=True)
    q, k, _ = qkv[0].split((H, G, G), dim=1)
    k = k.repeat_interleave(H // G, dim=1)                          # (T, H, D)
    scores = torch.einsum("qhd,khd->hqk", q[-n:].float(), k.float()) * D ** -.5
    return scores.masked_fill(hidden, -math.inf).softmax(-1).mean(0)


def image_starts(ids, patches):
    """Where each picture's vectors begin, once they stand in the place of its id."""
    starts = []
    for at, token in enumerate(ids):
        if token == data.IMAGE:
            starts.append(at + len(starts) * (patches - 1))
    return starts


@torch.inference_mode()
def attention_to_pictures(model, ids, tokens, pixels, layer=None):
    """(tokens, n, P): the attention to each patch of the n pictures from the position that wrote
    each token.

    ids, tokens: the prompt's and the answer's; layer: None for the one that attends to the pictures
    most. Raises UsageError as `check_model` does."""
    check_model(model, layer)
    llm, starts, P = model.llm, image_starts(ids, model.patches), model.patches
    row = torch.tensor([[*ids, *tokens]], device=llm.embed.weight.device)
    # without the last token: the position before it wrote it
    x = model.embed(row, pixels.to(llm.embed.weight))[0][:, :-1]                 # (1, T, C)
    T, n, c = x.shape[1], len(tokens), llm.config
    cos, sin = rope_table(torch.arange(T, device=x.device)[None], c.head_dim, c.rope_theta,
                          c.rope_scaling)
    rule, window = mask_rule(c.window, T)
    hidden = ~visible(rule, n, T, window, start=T - n, device=x.device)          # (n, T)
    found = []
    for i, block in enumerate(llm.blocks):
        if layer in (None, i):
            weights = attention_weights(c, block, x, cos, sin, hidden)
            pictures = [weights[:, start:start + P] for start in starts]
            found.append(torch.stack(pictures, 1).cpu())                # (n tokens, n, P)
        if layer == i:
            break
        x = block(x, cos, sin)
    return max(found, key=torch.sum)


def attention_to_patches(model, ids, tokens, pixels, layer=None):
    """(tokens, P): `attention_to_pictures` of the one picture. Raises UsageError for several."""
    if ids.count(data.IMAGE) != 1:
        raise UsageError("--attention is for one question about one picture: give one")
    return attention_to_pictures(model, ids, tokens, pixels, layer)[:, 0]


def mean_inside_box(grid, box):
    """Mean of grid (s, s) over patches whose middle lies in box (x1, y1, x2, y2), and the others.
    A box without a middle takes the patch that holds its own."""
    s = len(grid)
    middle = (torch.arange(s) + .5) / s
    x1, y1, x2, y2 = box
    rows, columns = (middle >= y1) & (middle <= y2), (middle >= x1) & (middle <= x2)
    inside = rows[:, None] & columns                                # (s, s)
    if not inside.any():
        row, column = int((y1 + y2) / 2 * s), int((x1 + x2) / 2 * s)
        inside[min(row, s - 1), min(column, s - 1)] = True
    return float(grid[inside].mean()), float(grid[~inside].mean())


def words_as_written(tokens, tokenizer):
    """[(word with the spaces around it, indices of its tokens)]; joined, an answer's text."""
    words, at, incomplete, decode = [], 0, [], inner_decode(tokenizer)
    for token in tokens:
        groups, incomplete = whole_groups(incomplete + [token], decode)
        for group, text in groups:
            # a word begins with a space, and behind one
            if not words or text.startswith((" ", "\n")) or words[-1][0][-1:].strip() == "":
                words.append(["", []])
            words[-1][0] += text
            words[-1][1] += range(at, at + len(group))
            at += len(group)
    return words


def tokens_by_word(tokens, tokenizer):
    """[(word, indices of its tokens)] of an answer."""
    words = words_as_written(tokens, tokenizer)
    return [(word.strip(), indices) for word, indices in words if word.strip()]


def as_seen(pixels):
    """pixels (3, S, S) -> PIL image (S, S): a picture, or its first tile, as the model sees it."""
    std, mean = torch.tensor(data.STD)[:, None, None], torch.tensor(data.MEAN)[:, None, None]
    rgb = (pixels * std + mean).clamp(0, 1).permute(1, 2, 0) * 255                  # (S, S, 3)
    return Image.fromarray(rgb.round().byte().numpy())


def draw(model, image, words, grids):
    """PIL image: the picture as the model saw it, once a word, bright where the word attended."""
    bright = as_seen(model.pixels(image)[0]).resize((SIDE, SIDE))
    dark = Image.blend(bright, Image.new("RGB", bright.size), .75)
    columns = min(8, len(words))
    rows = math.ceil(len(words) / columns)
    width, height = SIDE + GAP, SIDE + TITLE
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (word, grid) in enumerate(zip(words, grids)):
        light = Image.fromarray((grid / grid.max() * 255).byte().numpy())
        light = light.resize(bright.size, Image.Resampling.BILINEAR)
        x, y = i % columns * width + 4, i // columns * height + 18
        sheet.paste(Image.composite(bright, dark, light), (x, y))
        # the built-in font has Latin letters only
        pen.text((x, y - 14), word.encode("latin-1", "replace").decode("latin-1"), fill="black")
    return sheet


def save_attention(path, model, image, ids, tokens, pixels, layer=None):
    """Draw what each word of the answer attended to, into `path`. image: the picture's file."""
    words = tokens_by_word(tokens, model.tokenizer)
    if not words:
        note(f"note: the answer has no words: {path} is not drawn")
        return
    side = int(model.patches ** .5)
    weights = attention_to_patches(model, ids, tokens, pixels, layer).view(-1, side, side)
    grids = [weights[indices].mean(0) for _, indices in words]          # the mean of its tokens
    sheet = draw(model, data.load_image(image), [word for word, _ in words], grids)
    try:
        sheet.save(path)
    except (OSError, ValueError) as error:          # no such folder; no such kind of picture
        raise UserError(f"--attention {path}: {error}: name a .png") from None
