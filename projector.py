"""projector.py: bridge the eye to the language model, and be the whole model.

    picture --ViT--> patches (P, Cv) --bridge--> P vectors of the language model's width --+
                                                                                          splice
    words ----------embedding table------------> one vector a token ----------------------+
                                                                                           |
                                                            LLaMA, which sees one row of vectors

The language model does not know that pictures exist: the bridge's vectors take the place of the
`<image>` token, and attention does the rest. That is all of LLaVA [LLaVA] 2304.08485 section 4.1.

After splicing, for template v1 (x is learned from, . is only read):

    <s> A chat between ... USER: [p1 p2 p3 ... pP] \\n What is this ? ASSISTANT: A red star . </s>
    .   . .    .           .      .  .  .      .   .  .    .  .    . .          x x   x    x x

    bridge     what it is                          systems
    linear     W p + b                             LLaVA
    mlp        W2 gelu(W1 p + b1) + b2             LLaVA-1.5, LLaVA-NeXT, ShareGPT4V
    qformer    norm, 32 queries, W q + b           BLIP-2, InstructBLIP, MiniGPT-4

A Q-Former hands on Q vectors, not P, and reads the class token too. BLIP-2 [BLIP-2] 2301.12597 puts
them before BOS, MiniGPT-4 [MiniGPT4] 2304.10592 behind it; in InstructBLIP [InstructBLIP]
2305.06500 the queries also read the instruction, and bring back what it asks for.

Letters: B batch, T tokens, T' tokens after splicing, P patches, Q queries, C width, n pictures.
Alone: `python projector.py` prints a spliced row.
Next: data.py, which makes the rows.
"""

import json
import re
import sys
from pathlib import Path

import torch
from torch import nn

import data
from clip import Config as ViTConfig
from clip import LayerNorm, prefixed, ViT
from formats import configs
from formats.adapters import Adapted, Adapter, is_adapter
from formats.anyres import ANYRES_GRIDS
from formats.bert import BertTokenizer
from formats.checkpoints import (
    check_identity_layer,
    dtype_name,
    expand_names,
    export,
    load_into,
    resolve,
    save_weights,
)
from formats.errors import UsageError
from formats.export import chat_template, save_tokenizer
from formats.families import ln_vision_eps, read_official_config, read_vlm_config
from formats.names import canonical, canonical_names
from formats.strict_json import read_config
from formats.chat_templates import ChatTemplate, end_ids, folder_template
from kernels import gelu, linear_cross_entropy
from kernels.attention import document_spans
from llama import Config as LlamaConfig
from llama import Llama
from qformer import Config as QFormerConfig
from qformer import QFormer


class LinearProjector(nn.Module):
    """LLaVA's bridge: (..., Cv) -> (..., C)."""

    def __init__(self, vision, width):
        super().__init__()
        self.first = nn.Linear(vision, width)

    def forward(self, x):
        return self.first(x)


class MLPProjector(nn.Module):
    """LLaVA-1.5's bridge, "mlp2x_gelu": exact GELU, not CLIP's quick one."""

    def __init__(self, vision, width):
        super().__init__()
        self.first, self.second = nn.Linear(vision, width), nn.Linear(width, width)

    def forward(self, x):
        return self.second(gelu(self.first(x)))


class QFormerProjector(nn.Module):
    """BLIP-2's bridge: (n, 1+P, Cv) -> (n, Q, C). `norm` is ln_vision, which is not of the frozen
    tower and trains; a Q-Former with words reads ids (n, T) under mask (n, T) too."""

    def __init__(self, norm, qformer, width):
        super().__init__()
        self.norm, self.qformer = norm, qformer
        self.proj = nn.Linear(qformer.config.width, width)

    def forward(self, x, ids=None, mask=None):
        x = self.norm(x.to(self.norm.weight.dtype))             # the eye may be in half precision
        x = self.qformer(x, ids, text_mask=mask)
        return self.proj(x[:, :self.qformer.config.num_queries])


PROJECTORS = {"linear": LinearProjector, "mlp": MLPProjector}


def merge_tiles(tiles, newline, grid):
    """One anyres picture after the bridge: (1 + n, P, C) -> (grid.tokens, C)      [LLaVA-NeXT]

    The overview first. Then the tiles, laid out as they lay in the picture, without what was
    padding, each row of patches closed by the vector `newline` (C):

        tiles 1 2     a a a b b b ↵           a patch of tile 1 is a, of tile 2 is b
              3 4     c c c d d d ↵

    grid: data.anyres_grid of the picture's size, or None for a single tile, which gets one newline
    at its end. Official: llava_arch.py, "spatial_unpad"."""
    overview, C = tiles[0], tiles.shape[-1]
    if grid is None:
        return torch.cat((overview, newline[None]))
    (across, down), side = grid.tiles, int(overview.shape[0] ** .5)
    rows, columns = grid.unpadded
    x = tiles[1:].view(down, across, side, side, C).transpose(1, 2)
    x = x.reshape(down * side, across * side, C)
    top, left = (x.shape[0] - rows) // 2, (x.shape[1] - columns) // 2
    x = x[top:top + rows, left:left + columns]
    x = torch.cat((x, newline.expand(rows, 1, C)), 1)
    return torch.cat((overview, x.flatten(0, 1)))


def splice(ids, words, features, labels=None, attention_mask=None, left=False, lengths=None):
    """Put each picture's vectors where its IMAGE token stands.

    ids (B, T), IMAGE marking pictures; words (B, T, C) embeddings of the ids (anything at IMAGE);
    features: a list of n tensors (P_i, C), in the order in which the pictures occur; labels (B, T);
    keep (B, T) bool, False at padding, which is dropped and put back at the end (left: the front).
    Returns embeddings (B, T', C), labels (B, T') with IGNORE at pictures, keep (B, T').
    lengths: the documents of one packed row, [their tokens]; then B is 1, and in place of keep
    comes [[their places after splicing]], for kernels.attention.document_spans.
    Raises data.BadData when the number of pictures and of places for them differ."""
    B, T = ids.shape
    attention_mask = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask
    labels = torch.full_like(ids, data.IGNORE) if labels is None else labels
    picture = (ids == data.IMAGE) & attention_mask
    if int(picture.sum()) != len(features):
        raise data.BadData(f"{int(picture.sum())} <image> places in the text, but {len(features)} "
                           "pictures given; give one picture for each place")
    width = attention_mask.long()                                     # slots that a token takes: 0, 1 or P_i
    width[picture] = width.new_tensor([len(f) for f in features])
    source = torch.repeat_interleave(torch.arange(B * T, device=ids.device), width.flatten())
    sums = width.sum(1)                                     # (B,)
    longest = int(sums.max())
    row = source // T
    first = sums.cumsum(0) - sums
    column = torch.arange(len(source), device=ids.device) - first[row]
    if left:
        column = column + (longest - sums)[row]
    seen = picture.flatten()[source]                        # picture slots, in order
    x = words.new_zeros(B, longest, words.shape[-1])
    x[row[~seen], column[~seen]] = words.flatten(0, 1)[source[~seen]]
    if len(features):
        x[row[seen], column[seen]] = torch.cat(list(features)).to(x.dtype)
    out = labels.new_full((B, longest), data.IGNORE)
    out[row[~seen], column[~seen]] = labels.flatten()[source[~seen]]
    if lengths is not None:
        return x, out, [[int(part.sum()) for part in width[0].cpu().split(lengths)]]
    there = torch.zeros(B, longest, dtype=torch.bool, device=ids.device)
    there[row, column] = True
    return x, out, there


def sources(folder, base):
    """(the tokenizer's folder, config.json's, the weights) of a model, or of an adapter's folder
    and its base. LLaVA's adapters hold the config.json of the whole model, PEFT's none."""
    if not is_adapter(folder):
        if base is not None:
            raise UsageError(f"--model-base {base}: {folder} is a whole model, no LoRA adapter; "
                             "leave the base out")
        return folder, folder, data.load_weights(folder)
    adapter = Adapter(folder, data.load_weights)
    if base is None and adapter.base is None:
        raise UsageError(f"{folder}: a LoRA adapter that does not name its base; give it as well "
                         "(--model-base)")
    base = resolve(base or adapter.base)
    home = folder if (folder / "tokenizer.json").exists() else base
    whole = folder if (folder / "config.json").exists() else base
    return home, whole, Adapted(data.load_weights(base), adapter, canonical)


def asked_in(folder, words, projector, official, default):
    """The template in which a folder without our key is asked: what its chat template says, else
    `default`, else what the tokens of its vocabulary are for."""
    told = folder_template(folder, words, data.TEMPLATES, data.prompt) if projector != "qformer" else None
    if official and isinstance(told, ChatTemplate):
        # the chat template there is the language model's own, which the official code never reads
        told = str(told) if told.known and told != "qwen_1_5" else None
    if isinstance(told, ChatTemplate) and not told.known:
        print(f"note: {folder}: its chat template ({told.file}) is none of ours: the model is "
              "asked as it says; training needs --template", file=sys.stderr)
    if told or default:
        return told or default
    tokens = {"<|start_header_id|>": "llama_3", "<|im_start|>": "chatml_direct"}
    return next((name for token, name in tokens.items() if words.added(token) is not None), "v1")


class VLM(nn.Module):
    """Eye, bridge and language model. `words` is its tokenizer; `template` and `aspect` are how it
    was trained to be asked and shown pictures; they are saved with it. bridge: a name in BRIDGES,
    or a Queries; `reader` is the tokenizer of its Q-Former, if that reads the instruction.

    With aspect anyres it has the vector `newline` (C), and `grids` to cut pictures by; where pixels
    go in, the pictures' sizes go in too: [(width, height)], in pixels, as they were; not in `loss`,
    models of tiles are not trained here."""
    # ours: theirs, for the bridge; the two ends use their own tables behind a prefix
    BRIDGE_NAMES = {f"projector.{ours}.{kind}": f"multi_modal_projector.linear_{i}.{kind}"
                    for i, ours in ((1, "first"), (2, "second")) for kind in ("weight", "bias")}
    QUERY_NAMES = {f"projector.{ours}.{kind}": f"{theirs}.{kind}" for kind in ("weight", "bias")
                   for ours, theirs in (("norm", "vision_model.post_layernorm"),
                                        ("proj", "language_projection"))}
    IGNORE = {**ViT.IGNORE, **Llama.IGNORE}
    # text alone, too, passes by eye and bridge: of several ranks all must come to the same places
    always_run_vision = False

    def __init__(self, vision, projector, llm, words, template="v1", aspect="pad",
                 grids=ANYRES_GRIDS, qformer_tokenizer=None):
        super().__init__()
        self.vision, self.llm, self.tokenizer, self.qformer_tokenizer = vision, llm, words, qformer_tokenizer
        self.projector_type = projector if type(projector) is str else "qformer"
        self.template, self.aspect, self.grids = template, aspect, grids
        self.ends = frozenset()             # ids that end an answer, beside the template's own
        self.projector = (projector if self.projector_type == "qformer" else
                       PROJECTORS[projector](vision.config.width, llm.config.width))
        if self.projector_type == "qformer" and aspect != "squash":
            raise UsageError(f"aspect {aspect!r}: a Q-Former is shown pictures squashed, and its "
                             "files cannot say anything else; choose squash")
        if aspect == "anyres":
            C = llm.config.width
            self.newline = nn.Parameter(torch.randn(C) * C ** -.5)

    @property
    def image_size(self):
        return self.vision.config.image_size

    @property
    def patches(self):
        return (self.vision.config.image_size // self.vision.config.patch_size) ** 2

    def pixels(self, image):
        """PIL image -> pixels (n, 3, S, S), as this model was trained to be shown pictures."""
        return data.preprocess(image, self.image_size, self.aspect, self.grids)

    def grid(self, size):
        """data.Grid of a picture of `size` (width, height)."""
        side = self.vision.config.image_size // self.vision.config.patch_size
        return data.anyres_grid(*size, self.image_size, side, self.grids)

    def num_image_tokens(self, size=None):
        """Vectors that a picture of `size` (width, height) becomes."""
        if self.projector_type == "qformer":
            return self.projector.qformer.config.num_queries
        return self.grid(size).tokens if self.aspect == "anyres" else self.patches

    def qformer_text(self, ids, labels=None, attention_mask=None):
        """What an InstructBLIP's Q-Former reads where only ids are known: for each picture in ids
        (B, T) the text of its row, without what is learned or padding."""
        read = ids >= 0 if attention_mask is None else (ids >= 0) & attention_mask
        read = read if labels is None else read & (labels == data.IGNORE)
        counts = (ids == data.IMAGE).sum(1).tolist()
        return [self.tokenizer.decode(row[there].tolist()).strip()
                for row, there, count in zip(ids, read, counts) for _ in range(count)]

    def encode_images(self, pixels, sizes=None, questions=None):
        """pixels (n, 3, S, S) -> a list of (P, C), one a picture: what the language model gets.

        With sizes the pictures are in tiles, n in all. The class token is dropped: LLaVA reads
        patches only. A Q-Former reads it, and one with words a question for each picture, too.
        (`questions`: as they were typed, for ids may lose some of it.)
        Raises data.BadData when tiles and sizes do not fit."""
        # inference mode would be no faster, and the bridge could not keep its input for backward
        with torch.set_grad_enabled(torch.is_grad_enabled()
                                    and any(p.requires_grad for p in self.vision.parameters())):
            patches = self.vision(pixels.to(self.vision.cls.dtype))
        if self.projector_type == "qformer":
            longest = min(128, self.projector.qformer.config.context)
            text = self.qformer_tokenizer.encode(questions, longest, left=True) if self.qformer_tokenizer else ()
            return list(self.projector(patches, *(t.to(pixels.device) for t in text)))
        features = self.projector(patches[:, 1:])
        if self.aspect != "anyres":
            return list(features)
        grids = [self.grid(size) for size in sizes or ()]
        counts = [1 + grid.tiles[0] * grid.tiles[1] for grid in grids]
        if len(pixels) == len(grids) != sum(counts):        # overviews alone
            grids, counts = [None] * len(grids), [1] * len(grids)
        if sum(counts) != len(pixels):
            raise data.BadData(f"{len(pixels)} tiles given, but pictures of sizes {sizes} have "
                               f"{sum(counts)}; give sizes=[(width, height)] of every picture")
        return [merge_tiles(tiles, self.newline, grid)
                for tiles, grid in zip(features.split(counts), grids)]

    def embed(self, ids, pixels=None, labels=None, attention_mask=None, left=False, sizes=None,
              questions=None, lengths=None):
        """ids and pictures -> one row of vectors each; see `splice` and, for questions, `asked`.
        Text alone wakes no eye."""
        words, features = self.llm.embed(ids.clamp(min=0)), []
        if pixels is not None and len(pixels):
            if self.qformer_tokenizer and questions is None:
                questions = self.qformer_text(ids, labels, attention_mask) if lengths is None else [
                    text for one in zip(ids.split(lengths, 1), labels.split(lengths, 1))
                    for text in self.qformer_text(*one)]
            features = self.encode_images(pixels, sizes, questions)
        elif self.always_run_vision:
            blank = torch.zeros(1, 3, self.image_size, self.image_size, device=ids.device)
            words = words + 0 * self.encode_images(blank, questions=["?"])[0].sum()
        return splice(ids, words, features, labels, attention_mask, left, lengths)

    def forward(self, ids, pixels=None, sizes=None, questions=None):
        """ids (B, T), pixels (n, 3, S, S) or None -> logits (B, T', V)."""
        return self.llm(self.embed(ids, pixels, sizes=sizes, questions=questions)[0])

    def loss(self, ids, labels, pixels=None, attention_mask=None, weights=None, lengths=None,
             questions=None):
        """Cross-entropy of the next token over supervised places; a scalar.

        weights (B, T), of the ids: the sum of weight · loss; None: the mean. lengths: of documents
        packed into one row, [their ids]; the first label of each must be IGNORE, for no text stands
        before it. questions: for `embed`. Only supervised rows reach the output head. Raises
        data.BadData if there are none."""
        learned = labels[:, 1:] != data.IGNORE
        x, labels, there = self.embed(ids, pixels, labels, attention_mask, questions=questions,
                                      lengths=lengths)
        rows = labels[:, 1:] != data.IGNORE
        if not rows.any():
            raise data.BadData("a batch has nothing to train on: every label is masked; look at "
                               "it with --show-batch")
        doc_spans = None if lengths is None else document_spans(there, x.device)
        hidden = self.llm.hidden(x, doc_spans=doc_spans)[:, :-1]
        # splicing moves labels and keeps their order, so these are the weights of those rows
        return linear_cross_entropy(hidden[rows], self.llm.head.weight, labels[:, 1:][rows],
                                    None if weights is None else weights[:, 1:][learned])

    # ------------------------------------------------------------------------- from and to disk

    def names(self):
        """The weight table, in the spelling that `save_pretrained` writes."""
        tongue = prefixed(self.llm.names(), "llm.", "language_model.")
        if self.projector_type == "qformer":
            asks = self.projector.qformer
            asks = asks.INSTRUCT_NAMES if asks.config.vocab else asks.NAMES
            return {**prefixed(self.vision.names(), "vision.", "vision_model."),
                    **self.QUERY_NAMES, **prefixed(asks, "projector.qformer.", ""), **tongue}
        table = {**prefixed(ViT.NAMES, "vision.", "vision_tower.vision_model."),
                 **self.BRIDGE_NAMES, **tongue}
        if self.projector_type == "linear":
            table = {k: v for k, v in table.items() if "projector.second" not in k}
        return table | ({"newline": "image_newline"} if self.aspect == "anyres" else {})

    def split_sizes(self, name):
        if name.startswith("llm."):
            return self.llm.split_sizes(name)
        if name.startswith("vision."):
            return [self.vision.config.width] * 3
        return [self.projector.qformer.config.width] * 2

    @classmethod
    def from_pretrained(cls, folder, dtype=None, base=None):
        """From a folder or hub id, in `dtype` or, if None, the file's own: transformers' LLaVA and
        LLaVA-NeXT in any spelling, the official safetensors (liuhaotian/llava-v1.6-*), InstructBLIP
        with Vicuna, and BLIP-2 and MiniGPT-4 of ours (with OPT or T5: refused).

        Where transformers and the official code cut a picture differently (data.anyres_grid), a
        model in transformers' layout is shown it as transformers does, and an official one as the
        official code does: each answers as it does at home. A LoRA adapter is added to its base,
        which it names itself if `base` is None. Raises data.BadModel, data.Offline, data.Usage."""
        folder = resolve(folder)
        home, folder, weights = sources(folder, base)
        c, qformer_tokenizer = read_config(folder), None
        official = "mm_projector_type" in c or "mm_vision_tower" in c
        made = (read_official_config if official else read_vlm_config)(folder, c)
        eye, tongue, projector, aspect, grids, default = made
        eye, tongue = ViTConfig(**eye), LlamaConfig(**tongue)
        words, known = data.Tokenizer(home), canonical_names(weights)
        embed, head = (f"language_model.{Llama.NAMES[k]}" for k in ("embed.weight", "head.weight"))
        tongue = Llama.settle_tie(tongue, weights, known.get(embed), known.get(head))
        template = (c["template"] if "template" in c else
                    asked_in(home, words, projector, official, default))
        if not isinstance(template, ChatTemplate) and template not in list(data.TEMPLATES):
            raise data.BadModel(f"{folder}: config.json says template {template!r}, which is not "
                                f"one of {', '.join(data.TEMPLATES)}; take another model")
        if c.get("model_type") == "instructblip":
            qformer_tokenizer, rows = BertTokenizer(folder / "qformer_tokenizer"), configs.qformer(c)["vocab"]
            if len(qformer_tokenizer) > rows + 1:              # a [DEC] more does no harm: nobody writes it
                raise data.BadModel(f"{folder}: qformer_tokenizer has {len(qformer_tokenizer)} tokens, the "
                                    f"Q-Former {rows} rows; take both from one place")
        ends = end_ids(folder, c)
        if not isinstance(template, ChatTemplate) and data.TEMPLATES[template].end == "\n":
            ends -= data.end_ids(template, words)       # a captioner's, not of what it learns next
        with torch.device("meta"):
            if projector == "qformer":
                norm = LayerNorm(eye.width, ln_vision_eps(folder, c, eye.eps))
                projector = QFormerProjector(norm, QFormer(QFormerConfig(**configs.qformer(c))), tongue.width)
            model = cls(ViT(eye), projector, Llama(tongue), words, template, aspect, grids, qformer_tokenizer)
        model.ends = frozenset(ends)
        words.fit(tongue.vocab, template)
        ignore, apart = dict(cls.IGNORE), not any(k.startswith("vision_tower.") for k in known)
        ignore |= Llama.ignored(tongue)
        if tongue.tie_embeddings and head in known:
            ignore[re.escape(known[head])] = "tied: the embedding once more, see settle_tie"
            known.setdefault(embed, known[head])        # the one name a tied file has it under
        if projector == "linear" and "multi_modal_projector.linear_2.weight" in known:
            ignore |= check_identity_layer(weights, known, tongue.width)
        if official and apart:
            model.vision = None             # frozen in training and not in the file: as it was
        table = {ours: tuple(known.get(t, t) for t in theirs)
                 for ours, theirs in expand_names(model, model.names()).items()}
        load_into(model, table, weights, ignore, dtype)
        if official and apart:
            model.vision = ViT.from_pretrained(c["mm_vision_tower"], dtype or weights.dtype)
        return model.eval()

    def config(self):
        """The dict of config.json, as transformers' LlavaConfig or Blip2Config reads it."""
        tiles = self.aspect == "anyres"
        if self.projector_type == "qformer":
            asks, eye, norm = self.projector.qformer.config, self.vision.config, self.projector.norm
            kind, name = ("instructblip", "InstructBlip") if asks.vocab else ("blip-2", "Blip2")
            eye = configs.vit_to_hf(eye) | ({"model_type": "instructblip_vision_model"}
                                 if asks.vocab and eye.eva else {})
            return {
                "model_type": kind,
                "architectures": [f"{name}ForConditionalGeneration"] * self.vision.config.eva,
                "dtype": dtype_name(self.llm.head.weight.dtype),
                "num_query_tokens": asks.num_queries, "image_token_index": self.image_token,
                "use_decoder_only_language_model": True,
                "tie_word_embeddings": self.llm.config.tie_embeddings, "vision_config": eye,
                "qformer_config": configs.qformer_to_hf(asks, bool(asks.vocab)),
                **({"ln_vision_eps": norm.eps} if norm.eps != self.vision.config.eps else {}),
                "text_config": configs.llama_to_hf(self.llm.config), "template": self.template,
                "image_aspect_ratio": self.aspect}
        own = isinstance(self.template, ChatTemplate)       # then its file says it
        return {
            "model_type": "llava_next" if tiles else "llava",
            "architectures": [f"Llava{'Next' * tiles}ForConditionalGeneration"],
            "dtype": dtype_name(self.llm.head.weight.dtype),
            **({"image_grid_pinpoints": self.pinpoints} if tiles else {}),
            "image_token_index": self.image_token, "image_seq_length": self.patches,
            "projector_hidden_act": "gelu" if self.projector_type == "mlp" else "linear",
            "multimodal_projector_bias": True, "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "tie_word_embeddings": self.llm.config.tie_embeddings,
            "text_config": configs.llama_to_hf(self.llm.config), "vision_config": configs.vit_to_hf(self.vision.config),
            **({} if own else {"template": self.template}), "image_aspect_ratio": self.aspect}

    @property
    def pinpoints(self):
        """Of config.json: [[height, width]], so that transformers cuts pictures as we do."""
        return [[down * self.image_size, across * self.image_size] for across, down in self.grids]

    @property
    def pad_token(self):
        """Id of `<pad>` in the files: the next one, if the tokenizer has none yet."""
        return self.tokenizer.added("<pad>", max(len(self.tokenizer), self.image_token + 1))

    @property
    def image_token(self):
        """Id of `<image>` in the files; ours is data.IMAGE, which is in no vocabulary."""
        return self.tokenizer.added("<image>", len(self.tokenizer))

    def save_pretrained(self, folder):
        """Everything that transformers' Llava(Next), Blip2 or InstructBlip ForConditionalGeneration
        and their processors read.

        The linear bridge is written as two layers, the second the identity, the activation
        "linear": the one form of it that transformers can express. A CLIP before a Q-Former is
        written as it is, and cannot be expressed there: transformers refuses it for its shapes."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        last = max(self.image_token, self.pad_token)
        if last >= self.llm.config.vocab:
            self.llm.resize_embeddings(last + 1)                 # transformers looks them up, then replaces them
        tensors = export(self, self.names())
        if self.projector_type == "linear":
            first = self.projector.first
            tensors["multi_modal_projector.linear_2.weight"] = torch.eye(len(first.bias)).to(
                first.weight)
            tensors["multi_modal_projector.linear_2.bias"] = torch.zeros_like(first.bias)
        save_weights(folder, tensors)
        S = {"height": self.image_size, "width": self.image_size}
        picture = {"do_resize": True, "resample": 3, "do_rescale": True, "do_normalize": True,
                   "rescale_factor": 1 / 255, "image_mean": list(data.MEAN),
                   "image_std": list(data.STD), "do_convert_rgb": True}
        if self.projector_type == "qformer":
            kind = f"{'InstructBlip' if self.qformer_tokenizer else 'Blip2'}Processor"
            picture |= {"size": S, "image_processor_type": "BlipImageProcessor"}
            shared = {"processor_class": kind, "num_query_tokens": self.num_image_tokens()}
        else:
            kind = "LlavaNext" if self.aspect == "anyres" else "Llava"
            side = S if self.aspect == "squash" else {"shortest_edge": self.image_size}
            picture |= {"size": side, "do_center_crop": True, "crop_size": S,
                        "do_pad": self.aspect in ("pad", "anyres"),
                        "image_processor_type": f"{kind}ImageProcessor",
                        **({"image_grid_pinpoints": self.pinpoints} if kind != "Llava" else {})}
            shared = {"processor_class": f"{kind}Processor", "patch_size": self.vision.config.patch_size,
                      "vision_feature_select_strategy": "default", "image_token": "<image>",
                      "num_additional_image_tokens": 1}
            self.save_chat_template(folder)
        if self.qformer_tokenizer:
            self.qformer_tokenizer.save(folder / "qformer_tokenizer")
        files = {"config.json": self.config(), "preprocessor_config.json": picture,
                 "processor_config.json": {**shared, "image_processor": picture},
                 # quirk: sampling settings with do_sample off make transformers refuse to save
                 "generation_config.json": {"bos_token_id": self.tokenizer.bos, "do_sample": False,
                                            "eos_token_id": self.stop_ids(),
                                            "pad_token_id": self.pad_token}}
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")
        save_tokenizer(self.tokenizer, folder, ("<image>", "<pad>"),
                            not isinstance(self.template, ChatTemplate))

    def stop_ids(self):
        """Ids that end an answer, as generation_config.json has them: one, or EOS and the rest."""
        ends = data.end_ids(self.template, self.tokenizer) | self.ends
        ends = sorted(ends, key=lambda i: (i != self.tokenizer.eos, i))
        return ends if len(ends) > 1 else ends[0] if ends else None

    def save_chat_template(self, folder):
        """A processor reads chat_template.json and adds BOS itself; a tokenizer reads
        chat_template.jinja and does not, so that this one begins with it. A folder's own goes
        on as it came."""
        texts = {"chat_template.jinja": None, "chat_template.json": None}
        if isinstance(self.template, ChatTemplate):
            texts["chat_template.jinja"] = self.template.source
        elif told := chat_template(ours := data.TEMPLATES[self.template]):
            texts["chat_template.jinja"] = chat_template(ours, self.tokenizer)
            texts["chat_template.json"] = json.dumps({"chat_template": told}, indent=2) + "\n"
        for name, text in texts.items():
            (folder / name).unlink(missing_ok=True)
            if text is not None:
                (folder / name).write_text(text)


if __name__ == "__main__":
    toy = Path(__file__).parent / "toy/weights"
    vlm = VLM.from_parts(toy / "clip", toy / "llama")
    row, target = data.encode([{"from": "human", "value": "<image>\nWhat colour is the star?"},
                               {"from": "gpt", "value": "The star is red."}], "v1", vlm.tokenizer)
    grey = torch.zeros(1, 3, vlm.image_size, vlm.image_size)
    x, y, _ = vlm.embed(torch.tensor([row]), grey, torch.tensor([target]))
    print(f"{len(row)} ids -> {tuple(x.shape)} vectors, {int((y != data.IGNORE).sum())} learned")
    spans = " ".join("[picture]" if i == data.IMAGE else vlm.tokenizer.decode([i]) for i in row)
    print(spans)
