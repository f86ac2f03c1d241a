"""toy/induction.py: starting values from which a small LLaMA learns to look things up in minutes.

"What colour is the star? The star is ..." has to find "star" in the text and copy the word before
it. That takes two layers: one writes into every position which words stand before it, the next
matches against those notes. Large models grow this circuit, the induction head [Induction]
2209.11895, suddenly, after a long plateau of loss. A toy of one million weights was still on that
plateau ("some colour that is present") after three million tokens from random values, so it starts
with the circuit laid out. These are only starting values: everything trains, and the model is a
plain LLaMA.

The width is four heads wide, C = 4 D, and each quarter of the residual stream gets a meaning:

    x = [ word | note 1 | note 2 | note 3 ]         note i: the word i tokens back
                                                    (note 3: those 3, 4 and 5 back)

    layer 0    head i looks so many back and copies `word` from there into a note. Position alone
               decides: channel 0 of every word is constant, and for a constant k, q = R(-i) k
               makes q . R(j-i) k largest at the distance i. At 4.5 it is the mean of 4 and 5
    layer 1-3  a head compares quarters of its own position with quarters of all others, in channels
               that hardly rotate, and copies a quarter from where they agree into `word`, where
               the output head reads it:   (note 1, word) -> note 1   is   "star is" -> "red"

How far the notes reach decides what can be told apart. "At top left is a small orange" goes on with
the shape of what is *top left*, 4 and 5 words back. When the notes reached 4 back and training
scenes seldom had two orange objects, the model looked up "orange" alone, and wrote the other
object's shape (docs/results.md, "Whose shape is it?"). So one head of layer 3 compares all quarters
at once: the patch that agrees with the most words is the one that is meant.
"""

import torch

WORD, NOTE1, NOTE2, NOTE3 = range(4)
ALL = (WORD, NOTE1, NOTE2, NOTE3)
# distance in tokens, the note it goes into, how many words that distance is the mean of
DISTANCES = ((1, NOTE1, 1), (2, NOTE2, 1), (3, NOTE3, 1), (4.5, NOTE3, 2))
BEFORE = (NOTE1, NOTE2, NOTE3)
# (queries, keys, copied) quarters of the heads of layers 1 to 3, for notes like "top left large red
# star; ...". Several queries or keys are added up: what agrees in the most words wins.
HEADS = (((ALL, BEFORE, WORD),          # what followed the same words: "top left is a large" -> red
          (NOTE1, NOTE1, WORD),
          (WORD, NOTE1, WORD),          # the induction head, "red" -> star
          (NOTE1, NOTE2, WORD)),
         ((ALL, BEFORE, WORD),
          (NOTE1, WORD, NOTE1),         # "star is" -> red, and -> large
          (NOTE1, WORD, NOTE2),
          (ALL, (WORD, NOTE1, NOTE2), NOTE3)),      # "red star is" -> top left
         ((WORD, WORD, WORD),           # the same among vectors that hold all words of a note in
          (NOTE1, WORD, WORD),          # one position, as an image's do: find it, copy it
          (ALL, WORD, WORD),            # "top left is a small orange" -> square: by all words
          (BEFORE, WORD, WORD)))


@torch.no_grad()
def init_induction_heads(model, seed=0):
    """model: llama.Llama whose width is four heads wide."""
    init_random(model, seed)
    init_notes(model.blocks[0], model.config)
    for block, heads in zip(model.blocks[1:4], HEADS):
        init_lookups(block, model.config, heads)
    # a copied word is a likely word
    model.head.weight.copy_(model.embed.weight / model.config.width ** 0.5)


def quarter(i, D):
    """Channels of the i-th quarter of the residual stream."""
    return slice(i * D, (i + 1) * D)


def init_random(model, seed):
    """Random values of the usual size; embeddings of equal length in the first quarter only."""
    c, D = model.config, model.config.head_dim
    rng = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.dim() == 2:
            p.normal_(0, p.shape[1] ** -0.5, generator=rng)
    for block in model.blocks:
        block.out.weight.mul_((2 * c.depth) ** -0.5)
        block.down.weight.mul_((2 * c.depth) ** -0.5)
    embed = model.embed.weight                              # (V, C)
    embed[:, :D].normal_(0, 2, generator=rng)               # rms 1 over the whole width
    embed[:, D:] = 0
    embed[:, 0] = 0
    embed.mul_(2 * (D - 1) ** .5 / embed.norm(dim=1, keepdim=True))
    embed[:, 0] = 2                         # equal lengths, so that RMSNorm leaves it a constant


def head_rows(block, c, part, head):
    """The rows (D, C) of one head's "q", "k" or "v" in the fused weight, set to 0; a view."""
    first = {"q": 0, "k": c.heads, "v": c.heads + c.kv_heads}[part] + head
    rows = block.qkv.weight[first * c.head_dim:(first + 1) * c.head_dim]
    rows.zero_()
    return rows


def rotations(c):
    """Angle of one position, for each pair of channels (D/2)."""
    return c.rope_theta ** (-torch.arange(c.head_dim // 2) * 2 / c.head_dim)


def init_notes(block, c):
    """Layer 0: four heads, each of which looks back by one of DISTANCES."""
    D = c.head_dim
    fast = torch.arange(4)                                  # the pairs that rotate fastest
    for head, (distance, note, words) in enumerate(DISTANCES):
        angle = distance * rotations(c)[fast]
        head_rows(block, c, "k", head)[fast, 0] = 3.5
        q = head_rows(block, c, "q", head)
        q[fast, 0] = 3.5 * torch.cos(angle)                 # rotated back by the distance
        q[fast + D // 2, 0] = -3.5 * torch.sin(angle)
        # the mean of two words is half of each
        head_rows(block, c, "v", head)[:, quarter(WORD, D)] = words * torch.eye(D)
        block.out.weight[:, quarter(head, D)] = 0
        block.out.weight[quarter(note, D), quarter(head, D)] = torch.eye(D)


def init_lookups(block, c, heads):
    """Layers 1 to 3: four heads, each of which finds quarters in others and copies one."""
    D = c.head_dim
    slow = torch.nonzero(rotations(c) < .005)[:, 0]         # pairs that hardly rotate
    slow = torch.cat((slow, slow + D // 2))                 # both channels of each pair
    for head, (queries, keys, copied) in enumerate(heads):
        for part, quarters in (("q", queries), ("k", keys)):
            rows = head_rows(block, c, part, head)
            for i in quarters if isinstance(quarters, tuple) else (quarters,):
                rows[slow, D * i + slow] = 1.75
        head_rows(block, c, "v", head)[:, quarter(copied, D)] = torch.eye(D)
        block.out.weight[:, quarter(head, D)] = 0
        block.out.weight[quarter(WORD, D), quarter(head, D)] = torch.eye(D)
