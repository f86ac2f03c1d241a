"""projector.py: put a picture's vectors between the words of a language model; the whole models.

    image --ViT--> patches (P, Cv) --projector--> P vectors of the language model's width --+
                                                                                           splice
    ids ----------embedding table------------> one vector a token --------------------------+
                                                                                            |
                                                              LLaMA, which reads one row of vectors

The language model does not know that pictures exist: the projected vectors stand where the
`<image>` token stood, and attention does the rest. That is all of LLaVA [LLaVA] 2304.08485 4.1.

After splicing, for template v1 (x: a token with loss, .: a token that is only read):

    <s> A chat between ... USER: [p1 p2 p3 ... pP] \\n What is this ? ASSISTANT: A red star . </s>
    .   . .    .           .      .  .  .      .   .  .    .  .    . .          x x   x    x x

    projector  what it computes                          models
    linear     W p + b                                   LLaVA
    mlp        W2 gelu(W1 p + b1) + b2                   LLaVA-1.5, LLaVA-NeXT, ShareGPT4V
    qformer    norm, 32 queries (qformer.py), W q + b    BLIP-2, InstructBLIP, MiniGPT-4

    Three classes below hold a whole model:
    VLM        LLaVA: the patches of the second-last ViT block, without the class token
    LlavaNext  adds tiles, square parts of a large picture, and lays their vectors side by side
    Blip2      has a Q-Former: Q vectors for a picture, not P; it reads the class token too

BLIP-2 [BLIP-2] 2301.12597 puts its Q vectors before BOS, MiniGPT-4 [MiniGPT4] 2304.10592 after it;
InstructBLIP's Q-Former [InstructBLIP] 2305.06500 reads the question together with the picture.

Letters: B batch, T tokens, T' after splicing, P patches, Q queries, C width, Cv the tower's, Cq the
Q-Former's, n pictures.
Alone: `python projector.py` prints a spliced row.    Next: data.py, which makes the rows.
"""

from pathlib import Path

import torch
from torch import nn

import clip
import data
import llama
import llms
import qformer
from formats import families, names
from formats.adapters import open_model
from formats.anyres import anyres_grid, ANYRES_GRIDS
from formats.batch_checks import check_image_count, check_labels, check_tile_count
from formats.export import image_token_id, save_blip2, save_llava
from kernels import gelu, linear_cross_entropy
from kernels.attention import document_spans


class LinearProjector(nn.Module):
    """LLaVA's: (..., Cv) -> (..., C)."""

    def __init__(self, vision_width, width):
        super().__init__()
        self.first = nn.Linear(vision_width, width)

    def forward(self, x):
        return self.first(x)


class MLPProjector(nn.Module):
    """LLaVA-1.5's, "mlp2x_gelu": (..., Cv) -> (..., C). The exact GELU, not CLIP's quick one."""

    def __init__(self, vision_width, width):
        super().__init__()
        self.first = nn.Linear(vision_width, width)
        self.second = nn.Linear(width, width)

    def forward(self, x):
        return self.second(gelu(self.first(x)))


class QFormerProjector(nn.Module):
    """BLIP-2's: (n, 1+P, Cv) -> (n, Q, C). `norm` is ln_vision, trained though the tower is not.
    A Q-Former with a text branch reads ids (n, T) under a mask (n, T) bool as well."""

    def __init__(self, norm, queries, width):
        super().__init__()
        self.norm, self.qformer = norm, queries
        queries.fp32_beside_fp16 = True                     # formats/language_models.py
        self.proj = nn.Linear(queries.config.width, width)

    def forward(self, x, ids=None, mask=None):
        x = self.norm(x.to(self.norm.weight.dtype))         # the tower may be in half precision
        x = self.qformer(x, ids, text_mask=mask)            # (n, Q+T, Cq)
        return self.proj(x[:, :self.qformer.config.num_queries].to(self.proj.weight.dtype))


PROJECTORS = {"linear": LinearProjector, "mlp": MLPProjector}


def merge_tiles(tiles, image_newline, grid):
    """One picture of LLaVA-NeXT after the projector: (1 + n, P, C) -> (grid.tokens, C).

    The overview stands first. The tiles are laid out as they were in the picture, padding is cut
    off, and each row of patches ends with the vector `image_newline` (C):
        tiles 1 2     a a a b b b N           a: a patch of tile 1, b: of tile 2, N: image_newline
              3 4     c c c d d d N

    grid: anyres_grid of the picture's size; None: the overview alone, with one image_newline at its
    end. Official: llava_arch.py, "spatial_unpad"."""
    overview, C = tiles[0], tiles.shape[-1]                 # (P, C)
    if grid is None:
        return torch.cat((overview, image_newline[None]))
    across, down = grid.tiles                               # tiles in a row, in a column
    side = int(overview.shape[0] ** .5)                     # patches along the side of a tile
    x = tiles[1:].view(down, across, side, side, C).transpose(1, 2)     # (down, side, across, ...)
    x = x.reshape(down * side, across * side, C)            # one large grid of patches
    rows, columns = grid.unpadded                           # patches that are no padding
    top, left = (x.shape[0] - rows) // 2, (x.shape[1] - columns) // 2
    x = x[top:top + rows, left:left + columns]
    x = torch.cat((x, image_newline.expand(rows, 1, C)), 1)             # (rows, columns + 1, C)
    return torch.cat((overview, x.flatten(0, 1)))


def splice(ids, text_embeds, image_embeds, labels=None, attention_mask=None, left=False,
           lengths=None):
    """Put the vectors of each picture where its IMAGE token stands.

    ids (B, T) with IMAGE for a picture; text_embeds (B, T, C) of the ids (any values at IMAGE);
    image_embeds: n tensors (P_i, C) in the pictures' order; labels (B, T); attention_mask (B, T)
    bool, False at padding, which is removed and put back at the end of the rows (left: the front).
    Returns embeddings (B, T', C), labels (B, T') with IGNORE at pictures, attention_mask (B, T').
    lengths: the tokens of each text in a packed row; then B is 1, and the third result is [[their
    tokens after splicing]], for document_spans. Raises BadData if pictures are too few or many."""
    B, T = ids.shape
    if attention_mask is None:
        attention_mask = torch.ones_like(ids, dtype=torch.bool)
    if labels is None:
        labels = torch.full_like(ids, data.IGNORE)          # nothing has loss
    is_image = (ids == data.IMAGE) & attention_mask
    check_image_count(int(is_image.sum()), len(image_embeds))
    # slots that a token takes: 0 (padding), 1 (text) or P_i (picture)
    slots = attention_mask.long()                           # (B, T)
    slots[is_image] = slots.new_tensor([len(x) for x in image_embeds])
    row_lengths = slots.sum(1)                              # (B,)
    longest = int(row_lengths.max())                        # T'
    # one entry for each slot of all rows: the token it comes from, and where it goes
    token = torch.repeat_interleave(torch.arange(B * T, device=ids.device), slots.flatten())
    row = token // T                                        # (all slots,), like token and column
    row_starts = row_lengths.cumsum(0) - row_lengths
    column = torch.arange(len(token), device=ids.device) - row_starts[row]
    if left:                                                # padding first: rows end together
        column = column + (longest - row_lengths)[row]
    from_image = is_image.flatten()[token]
    text = ~from_image                                      # slots of one token
    x = text_embeds.new_zeros(B, longest, text_embeds.shape[-1])
    x[row[text], column[text]] = text_embeds.flatten(0, 1)[token[text]]
    if len(image_embeds):
        x[row[from_image], column[from_image]] = torch.cat(list(image_embeds)).to(x.dtype)
    spliced_labels = labels.new_full((B, longest), data.IGNORE)
    spliced_labels[row[text], column[text]] = labels.flatten()[token[text]]
    if lengths is not None:                                 # one packed row: no padding
        parts = slots[0].cpu().split(lengths)
        return x, spliced_labels, [[int(part.sum()) for part in parts]]
    mask = torch.zeros(B, longest, dtype=torch.bool, device=ids.device)
    mask[row, column] = True
    return x, spliced_labels, mask


class VLM(nn.Module):
    """LLaVA: vision tower, projector, language model and its tokenizer. `template` names the
    conversation format of its training, `aspect` how pictures are made square (data.preprocess)."""
    # With several ranks a text-only batch runs the vision tower on a blank picture, so that all
    # ranks issue the same collectives.
    always_run_vision = False
    grids, qformer_tokenizer = None, None   # of LlavaNext; of Blip2
    save_files = staticmethod(save_llava)

    def __init__(self, vision, projector, llm, tokenizer, template="v1", aspect="pad"):
        """vision: a ViT; projector: linear or mlp; llm: a Llama; tokenizer: a data.Tokenizer."""
        super().__init__()
        self.vision, self.llm, self.tokenizer = vision, llm, tokenizer
        self.template, self.aspect, self.projector_type = template, aspect, projector
        self.projector = PROJECTORS[projector](vision.config.width, llm.config.width)
        self.stop_ids = frozenset()         # ids that end an answer, beside the template's own

    @property
    def image_size(self):                   # pixels of a side
        return self.vision.config.image_size

    @property
    def patches(self):                      # P, of one picture or tile
        return (self.image_size // self.vision.config.patch_size) ** 2

    @property
    def image_token(self):
        """Id of <image> in the files; here a picture is data.IMAGE, which is in no vocabulary."""
        return image_token_id(self.tokenizer)

    def pixels(self, image):
        """PIL image -> pixels (n, 3, S, S), prepared as in this model's training."""
        return data.preprocess(image, self.image_size, self.aspect, self.grids)

    def num_image_tokens(self, size=None):
        """Vectors that a picture of `size` (width, height) becomes."""
        return self.patches

    def encode_vision(self, pixels):
        """pixels (n, 3, S, S) -> (n, 1+P, Cv), the class token first."""
        vision_trains = any(p.requires_grad for p in self.vision.parameters())
        # not inference mode: the projector must keep its input for backward
        with torch.set_grad_enabled(torch.is_grad_enabled() and vision_trains):
            return self.vision(pixels.to(self.vision.cls.dtype))

    def encode_images(self, pixels, sizes=None, questions=None):
        """pixels (n, 3, S, S) -> a list of (P, C), one for each picture: the image_embeds.
        sizes: [(width, height)] of the pictures in pixels, for LlavaNext. questions: [what is asked
        about each picture], for an InstructBLIP."""
        return list(self.projector(self.encode_vision(pixels)[:, 1:]))      # no class token

    def qformer_text(self, ids, labels=None, attention_mask=None, lengths=None):
        """Questions for a Q-Former, of which there is none here."""

    def embed(self, ids, pixels=None, labels=None, attention_mask=None, left=False, sizes=None,
              questions=None, lengths=None):
        """ids (B, T) and pixels (n, 3, S, S) -> embeddings (B, T', C) and the rest: see `splice`.
        Without pictures the vision tower is not run. sizes, questions: see `encode_images`."""
        text_embeds, image_embeds = self.llm.embed(ids.clamp(min=0)), []    # IMAGE is negative
        if pixels is not None and len(pixels):
            if questions is None:
                questions = self.qformer_text(ids, labels, attention_mask, lengths)
            image_embeds = self.encode_images(pixels, sizes, questions)
        elif self.always_run_vision:
            blank = torch.zeros(1, 3, self.image_size, self.image_size, device=ids.device)
            # times 0: nothing changes, and backward runs through the projector as well
            text_embeds = text_embeds + 0 * self.encode_images(blank, questions=["?"])[0].sum()
        return splice(ids, text_embeds, image_embeds, labels, attention_mask, left, lengths)

    def forward(self, ids, pixels=None, sizes=None, questions=None, **more):
        """ids (B, T), pixels (n, 3, S, S) or None -> logits (B, T', V). more: T5's decoder_ids."""
        return self.llm(self.embed(ids, pixels, sizes=sizes, questions=questions)[0], **more)

    def loss(self, ids, labels, pixels=None, attention_mask=None, weights=None, lengths=None,
             questions=None):
        """Cross-entropy of the next token, where labels are not IGNORE; a scalar.

        weights (B, T), one for each id: the sum of weight * loss; None: the mean. lengths: see
        `splice`; each text's first label must be IGNORE, as no token of its own stands before it.
        Only positions with loss reach the output head. Raises BadData if there are none."""
        has_loss = labels[:, 1:] != data.IGNORE                             # (B, T-1)
        check_labels(has_loss)
        x, labels, mask = self.embed(ids, pixels, labels, attention_mask, questions=questions,
                                     lengths=lengths)
        doc_spans = None
        if lengths is not None:                 # one packed row: its texts do not see each other
            mask, doc_spans = None, document_spans(mask, x.device)
        hidden, targets = self.llm.predictions(x, labels, mask, doc_spans)  # (N, C), (N,)
        if weights is not None:                 # splicing keeps the labels' order: one for each
            weights = weights[:, 1:][has_loss]
        return linear_cross_entropy(hidden, self.llm.head.weight, targets, weights)

    def names(self):
        """{our name: name in the files} of all weights, as `save_pretrained` writes them."""
        return names.LLAVA

    @classmethod
    def from_family(cls, family, tokenizer, template):
        """A model with the sizes in `family` (formats/families.py)."""
        vision = clip.ViT(clip.Config(**family.vision))
        llm = llama.Llama(llama.Config(**family.llm))
        return cls(vision, family.projector, llm, tokenizer, template, family.aspect)

    @classmethod
    def from_pretrained(cls, folder, dtype=None, base=None):
        """The VLM, LlavaNext or Blip2 of a folder or hub id; in `dtype` or the file's own.

        Read are transformers' LLaVA, LLaVA-NeXT and InstructBLIP, official safetensors (liuhaotian/
        llava-v1.6-*), and what `save_pretrained` writes. A LoRA adapter is added to `base`, None:
        to the base that it names. Raises BadModel, Offline, UsageError."""
        tokenizer_folder, folder, weights = open_model(folder, base)
        family = families.read_family(folder, weights)
        tokenizer = data.Tokenizer(tokenizer_folder)
        template = families.choose_template(family, tokenizer, data.TEMPLATES, data.prompt)
        with torch.device("meta"):                          # shapes without memory
            model = CLASSES[family.name].from_family(family, tokenizer, template)
        model.stop_ids = families.read_stop_ids(family, template, tokenizer, data.TEMPLATES,
                                                data.end_ids)
        tokenizer.fit(model.llm.config.vocab, template)     # no ids beyond the embedding's rows
        return families.load_vlm(model, family, weights, dtype, clip.ViT.from_pretrained).eval()

    def save_pretrained(self, folder):
        """Everything that transformers' model of the same name and its processor read."""
        stop_ids = data.end_ids(self.template, self.tokenizer) | self.stop_ids
        self.save_files(self, folder, data.template_of(self.template), stop_ids)


class LlavaNext(VLM):
    """LLaVA-NeXT: the whole picture, then its tiles, each at the tower's resolution. Beside pixels
    it needs `sizes`, the pictures' (width, height). `loss` has none: it is not trained here."""

    def __init__(self, vision, projector, llm, tokenizer, template="v1", aspect="anyres"):
        super().__init__(vision, projector, llm, tokenizer, template, aspect)
        self.grids = ANYRES_GRIDS           # (tiles across, tiles down) to choose from
        C = llm.config.width
        self.image_newline = nn.Parameter(torch.randn(C) * C ** -.5)    # ends a row of patches

    def grid(self, size):
        """How a picture of `size` (width, height) is cut: an AnyresGrid."""
        side = self.image_size // self.vision.config.patch_size
        return anyres_grid(*size, self.image_size, side, self.grids)

    def num_image_tokens(self, size=None):
        return self.grid(size).tokens

    def encode_images(self, pixels, sizes=None, questions=None):
        """pixels (n, 3, S, S), the tiles of all pictures -> a list of (tokens, C), one a picture.
        Raises BadData when tiles and sizes do not fit."""
        features = self.projector(self.encode_vision(pixels)[:, 1:])        # (n, P, C)
        grids = [self.grid(size) for size in sizes or ()]
        counts = [1 + grid.tiles[0] * grid.tiles[1] for grid in grids]      # tiles of a picture
        if len(pixels) == len(grids) != sum(counts):        # overviews alone
            grids, counts = [None] * len(grids), [1] * len(grids)
        check_tile_count(len(pixels), counts, sizes)
        pairs = zip(features.split(counts), grids)
        return [merge_tiles(tiles, self.image_newline, grid) for tiles, grid in pairs]


class Blip2(VLM):
    """BLIP-2, InstructBLIP, MiniGPT-4: a Q-Former between vision tower and LLaMA (or OPT, T5)."""
    projector_type = "qformer"
    save_files = staticmethod(save_blip2)

    def __init__(self, vision, projector, llm, tokenizer, template="blip2", qformer_tokenizer=None):
        """projector: a QFormerProjector; qformer_tokenizer: a BertTokenizer, of an InstructBLIP."""
        nn.Module.__init__(self)                            # not VLM's, which makes a projector
        self.vision, self.llm, self.tokenizer = vision, llm, tokenizer
        self.projector, self.qformer_tokenizer = projector, qformer_tokenizer
        self.template, self.aspect = template, "squash"     # its files cannot say anything else
        self.stop_ids = frozenset()

    def num_image_tokens(self, size=None):
        return self.projector.qformer.config.num_queries

    def encode_images(self, pixels, sizes=None, questions=None):
        """pixels (n, 3, S, S) -> a list of (Q, C). The Q-Former reads the class token, too."""
        features = self.encode_vision(pixels)               # (n, 1+P, Cv)
        if self.qformer_tokenizer is None:                  # not an InstructBLIP
            return list(self.projector(features))           # Q vectors of each picture
        longest = min(128, self.projector.qformer.config.context)           # officially 128
        ids, mask = self.qformer_tokenizer.encode(questions, longest, left=True)
        return list(self.projector(features, ids.to(pixels.device), mask.to(pixels.device)))

    def qformer_text(self, ids, labels=None, attention_mask=None, lengths=None):
        """An InstructBLIP's questions by ids alone: for each picture in ids (B, T) the text of its
        row, without tokens that have loss and without padding."""
        if self.qformer_tokenizer is None:
            return None
        is_read = ids >= 0                                  # (B, T), not IMAGE
        if attention_mask is not None:
            is_read = is_read & attention_mask
        if labels is not None:
            is_read = is_read & (labels == data.IGNORE)
        rows, masks = ids, is_read
        if lengths is not None:                             # the texts of one packed row
            rows, masks = ids[0].split(lengths), is_read[0].split(lengths)
        texts = []
        for row, mask in zip(rows, masks):
            text = self.tokenizer.decode(row[mask].tolist()).strip()
            texts += [text] * int((row == data.IMAGE).sum())
        return texts

    def names(self):
        return names.blip2(self.vision.config, bool(self.projector.qformer.config.vocab),
                           self.llm.table)

    @classmethod
    def from_family(cls, family, tokenizer, template):
        vision = clip.ViT(clip.Config(**family.vision))
        llm = llms.build(family.llm_kind, family.llm)
        norm = clip.LayerNorm(vision.config.width, family.ln_vision_eps)
        queries = qformer.QFormer(qformer.Config(**family.qformer))
        projector = QFormerProjector(norm, queries, llm.config.width)
        qformer_tokenizer = families.read_qformer_tokenizer(family)
        return cls(vision, projector, llm, tokenizer, template, qformer_tokenizer)


CLASSES = {"llava": VLM, "llava_next": LlavaNext, "blip2": Blip2}


def main():
    """Print a row before and after splicing."""
    toy = Path(__file__).parent / "toy/weights"
    vision, llm = clip.ViT.from_pretrained(toy / "clip"), llama.Llama.from_pretrained(toy / "llama")
    vlm = VLM(vision, "mlp", llm, data.Tokenizer(toy / "llama"))        # the projector is random
    talk = [{"from": "human", "value": "<image>\nWhat colour is the star?"},
            {"from": "gpt", "value": "The star is red."}]
    ids, labels = data.encode(talk, "v1", vlm.tokenizer)
    grey = torch.zeros(1, 3, vlm.image_size, vlm.image_size)
    x, labels, _ = vlm.embed(torch.tensor([ids]), grey, torch.tensor([labels]))
    print(f"{len(ids)} ids -> {tuple(x.shape)}, {int((labels != data.IGNORE).sum())} with loss")
    print(*("[picture]" if i == data.IMAGE else vlm.tokenizer.decode([i]) for i in ids))


if __name__ == "__main__":
    main()
