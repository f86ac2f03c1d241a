"""TODO"""

import math

import torch

import data
from decoding.stopping import inner_decode, whole_groups
from formats.errors import UsageError
from kernels import causal, rope, rope_table
from kernels.attention import visible


@torch.inference_mode()
def attention_to_patches(model, ids, tokens, pixels, layer=None):
    """How much each token of an answer looked at each patch: (tokens, P), the mean over heads of
    the attention from the place that wrote it; layer: None, the one that looks there most.

    Computed again from the whole text in one pass: while writing nothing is kept or slowed down.
    Raises data.Usage for models whose pictures are no grid of patches."""
    if model.projector_type == "qformer" or model.aspect == "anyres":
        raise UsageError("--attention needs a model that reads a picture as one grid of patches: "
                         "LLaVA or LLaVA-1.5, no Q-Former and no tiles")
    if ids.count(data.IMAGE) != 1:
        raise UsageError("--attention is for one question about one picture: give one")
    llm, at = model.llm, ids.index(data.IMAGE)
    if layer is not None and not 0 <= layer < llm.config.depth:
        raise UsageError(f"--layer {layer}: the model has layers 0 to {llm.config.depth - 1}")
    row = torch.tensor([[*ids, *tokens]], device=llm.embed.weight.device)
    x = model.embed(row, pixels.to(llm.embed.weight))[0][:, :-1]                 # (1, T, C)
    T, n = x.shape[1], len(tokens)
    cos, sin = rope_table(torch.arange(T, device=x.device)[None], llm.config.head_dim,
                          llm.config.rope_theta, llm.config.rope_scaling)
    H, G, D = llm.config.heads, llm.config.kv_heads, llm.config.head_dim
    rule = {"allow": causal, **llm.config.rule(T)}
    hidden = ~visible(**rule, rows=n, columns=T, start=T - n, device=x.device)   # (n, T)
    found = []
    for i, block in enumerate(llm.blocks):
        if layer in (None, i):
            qkv = block.qkv(block.norm1(x)).view(1, T, H + 2 * G, D)
            rope(qkv[:, :, :H + G], cos, sin, inplace=True)
            q, k, _ = qkv[0].split((H, G, G), dim=1)
            k = k.repeat_interleave(H // G, dim=1)
            scores = torch.einsum("qhd,khd->hqk", q[-n:].float(), k.float()) * D ** -.5
            p = scores.masked_fill(hidden, -math.inf).softmax(-1).mean(0)         # (n, T)
            found.append(p[:, at:at + model.patches].cpu())
        if layer == i:
            break
        x = block(x, cos, sin)
    return max(found, key=torch.sum)


def mean_inside_box(grid, box):
    """Mean of grid (s, s) over patches whose middle lies in box (x1, y1, x2, y2), and the others.
    A box without a middle takes the patch that holds its own."""
    s = len(grid)
    middle = (torch.arange(s) + .5) / s
    x1, y1, x2, y2 = box
    there = ((middle >= y1) & (middle <= y2))[:, None] & ((middle >= x1) & (middle <= x2))
    if not there.any():
        there[min(int((y1 + y2) / 2 * s), s - 1), min(int((x1 + x2) / 2 * s), s - 1)] = True
    return float(grid[there].mean()), float(grid[~there].mean())


def draw(model, image, words, grids):
    """PIL image: the picture as the model saw it, once a word, lit where the word looked."""
    from PIL import Image, ImageDraw
    std, mean = (torch.tensor(v)[:, None, None] for v in (data.STD, data.MEAN))
    seen = (model.pixels(image)[0] * std + mean).clamp(0, 1).permute(1, 2, 0) * 255
    seen = Image.fromarray(seen.byte().numpy()).resize((168, 168))
    across = min(8, len(words))
    sheet = Image.new("RGB", (across * 176, -(-len(words) // across) * 192), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (word, grid) in enumerate(zip(words, grids)):
        light = (grid / grid.max() * 255).byte().numpy()
        light = Image.fromarray(light).resize(seen.size, Image.Resampling.BILINEAR)
        dark = Image.blend(seen, Image.new("RGB", seen.size), .75)
        x, y = i % across * 176 + 4, i // across * 192 + 18
        sheet.paste(Image.composite(seen, dark, light), (x, y))
        # the built-in font has Latin letters only
        pen.text((x, y - 14), word.encode("latin-1", "replace").decode("latin-1"), fill="black")
    return sheet


def tokens_by_word(tokens, words):
    """[(word, numbers of its tokens)] of an answer."""
    out, at, pending, decode = [], 0, [], inner_decode(words)
    for token in tokens:
        groups, pending = whole_groups(pending + [token], decode)
        for group, text in groups:
            if not out or text.startswith((" ", "\n")) or not out[-1][0].strip():
                out.append(["", []])
            out[-1][0] += text.strip()
            out[-1][1] += range(at, at + len(group))
            at += len(group)
    return [(word, numbers) for word, numbers in out if word]
