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

Letters: B batch, T tokens, T' tokens after splicing, P patches, C width, n pictures.
Alone: `python projector.py` prints a spliced row.
Next: data.py, which makes the rows.
"""

import json
from pathlib import Path

import torch
from torch import nn

import data
from clip import Config as ViTConfig
from clip import ViT, prefixed
from kernels import linear_cross_entropy
from llama import Config as LlamaConfig
from llama import Llama


class Linear(nn.Module):
    """LLaVA's bridge: (..., Cv) -> (..., C)."""

    def __init__(self, vision, width):
        super().__init__()
        self.first = nn.Linear(vision, width)

    def forward(self, x):
        return self.first(x)


class MLP(nn.Module):
    """LLaVA-1.5's bridge, "mlp2x_gelu": exact GELU, not CLIP's quick one."""

    def __init__(self, vision, width):
        super().__init__()
        self.first, self.second = nn.Linear(vision, width), nn.Linear(width, width)

    def forward(self, x):
        return self.second(nn.functional.gelu(self.first(x)))


BRIDGES = {"linear": Linear, "mlp": MLP}


def splice(ids, words, features, labels=None, keep=None, left=False):
    """Put each picture's vectors where its IMAGE token stands.

    ids (B, T), IMAGE marking pictures; words (B, T, C) embeddings of the ids (anything at IMAGE);
    features: a list of n tensors (P_i, C), in the order in which the pictures occur; labels (B, T);
    keep (B, T) bool, False at padding, which is dropped and put back at the end (left: the front).
    Returns embeddings (B, T', C), labels (B, T') with IGNORE at pictures, keep (B, T').
    Raises data.BadData when the number of pictures and of places for them differ."""
    B, T = ids.shape
    keep = torch.ones_like(ids, dtype=torch.bool) if keep is None else keep
    labels = torch.full_like(ids, data.IGNORE) if labels is None else labels
    picture = (ids == data.IMAGE) & keep
    if int(picture.sum()) != len(features):
        raise data.BadData(f"{int(picture.sum())} <image> places in the text, but {len(features)} "
                           "pictures given; give one picture for each place")
    width = keep.long()                                     # slots that a token takes: 0, 1 or P_i
    width[picture] = width.new_tensor([len(f) for f in features])
    source = torch.repeat_interleave(torch.arange(B * T, device=ids.device), width.flatten())
    lengths = width.sum(1)                                  # (B,)
    longest = int(lengths.max())
    row = source // T
    first = lengths.cumsum(0) - lengths
    column = torch.arange(len(source), device=ids.device) - first[row]
    if left:
        column = column + (longest - lengths)[row]
    seen = picture.flatten()[source]                        # picture slots, in order
    x = words.new_zeros(B, longest, words.shape[-1])
    x[row[~seen], column[~seen]] = words.flatten(0, 1)[source[~seen]]
    if len(features):
        x[row[seen], column[seen]] = torch.cat(list(features)).to(x.dtype)
    out = labels.new_full((B, longest), data.IGNORE)
    out[row[~seen], column[~seen]] = labels.flatten()[source[~seen]]
    there = torch.zeros(B, longest, dtype=torch.bool, device=ids.device)
    there[row, column] = True
    return x, out, there


class VLM(nn.Module):
    """Eye, bridge and language model. `words` is its tokenizer; `template` and `aspect` are how it
    was trained to be asked and shown pictures; they are saved with it."""
    # ours: theirs, for the bridge; the two ends use their own tables behind a prefix
    BRIDGE_NAMES = {f"bridge.{ours}.{kind}": f"multi_modal_projector.linear_{i}.{kind}"
                    for i, ours in ((1, "first"), (2, "second")) for kind in ("weight", "bias")}

    def __init__(self, vision, bridge, llm, words, template="v1", aspect="pad"):
        super().__init__()
        self.vision, self.llm, self.words = vision, llm, words
        self.kind, self.template, self.aspect = bridge, template, aspect
        self.bridge = BRIDGES[bridge](vision.config.width, llm.config.width)

    @property
    def image_size(self):
        return self.vision.config.image

    @property
    def patches(self):
        return (self.vision.config.image // self.vision.config.patch) ** 2

    def see(self, pixels):
        """pixels (n, 3, S, S) -> (n, P, C): what the language model gets. The class token is
        dropped: LLaVA reads patches only."""
        with torch.set_grad_enabled(torch.is_grad_enabled()
                                    and any(p.requires_grad for p in self.vision.parameters())):
            patches = self.vision(pixels)[:, 1:]
        return self.bridge(patches)

    def embed(self, ids, pixels=None, labels=None, keep=None, left=False):
        """ids and pictures -> one row of vectors each; see `splice`."""
        words = self.llm.embed(ids.clamp(min=0))
        features = [] if pixels is None or not len(pixels) else list(self.see(pixels))
        return splice(ids, words, features, labels, keep, left)

    def forward(self, ids, pixels=None):
        """ids (B, T), pixels (n, 3, S, S) or None -> logits (B, T', V)."""
        return self.llm(self.embed(ids, pixels)[0])

    def loss(self, ids, labels, pixels=None, keep=None):
        """Mean cross-entropy of the next token over supervised places; a scalar.

        Only supervised rows reach the output head. Raises data.BadData if there are none."""
        x, labels, _ = self.embed(ids, pixels, labels, keep)
        rows = labels[:, 1:] != data.IGNORE
        if not rows.any():
            raise data.BadData("a batch has nothing to train on: every label is masked; look at "
                               "it with --show-batch")
        hidden = self.llm.hidden(x)[:, :-1]
        return linear_cross_entropy(hidden[rows], self.llm.head.weight, labels[:, 1:][rows])

    # ------------------------------------------------------------------------- from and to disk

    @classmethod
    def names(cls, vision, llm, bridge):
        table = {**prefixed(ViT.NAMES, "vision.", "vision_tower.vision_model."),
                 **cls.BRIDGE_NAMES, **prefixed(llm.names(), "llm.", "language_model.")}
        return {k: v for k, v in table.items() if bridge == "mlp" or "bridge.second" not in k}

    def split_sizes(self, name):
        if name.startswith("llm."):
            return self.llm.split_sizes(name)
        return [self.vision.config.width] * 3

    @classmethod
    def from_parts(cls, vision, llm, bridge="mlp", template="v1", aspect="pad", seed=0):
        """A new model from a CLIP folder and a LLaMA folder; the bridge is drawn from the seed."""
        eye, tongue = ViT.from_pretrained(vision), Llama.from_pretrained(llm)
        words = data.Tokenizer(data.resolve(llm))
        rows = -(-(len(words) + 2) // 64) * 64      # room for <image> and <pad>, as the hub has it
        if rows > tongue.config.vocab:
            tongue.grow(rows)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = cls(eye, bridge, tongue, words, template, aspect)
            # The bridge should speak as loudly as words do. Torch's default start is louder than
            # Vicuna's words (0.02) and stays, as in the official runs; the toy's words are at 1.
            said = model.bridge(torch.randn(1000, eye.config.width))
            last = model.bridge.second if bridge == "mlp" else model.bridge.first
            with torch.no_grad():
                last.weight.mul_(max(1.0, float(tongue.embed.weight.std() / said.std())))
        return model

    @classmethod
    def from_pretrained(cls, folder):
        """From a folder or hub id in transformers' LLaVA layout. Raises data.BadModel, Offline."""
        folder = data.resolve(folder)
        c = data.read_config(folder)
        if c.get("model_type") != "llava":
            raise data.BadModel(f"{folder}: config.json says model_type {c.get('model_type')!r}, "
                                "not 'llava'; give the model/ folder of a run")
        for key, known in (("template", tuple(data.TEMPLATES)), ("vision_feature_layer", (-2,)),
                           ("image_aspect_ratio", ("square", "pad", "anyres")),
                           ("vision_feature_select_strategy", ("default",))):
            if key in c and c[key] not in known:
                raise data.BadModel(f"{folder}: config.json says {key} {c[key]!r}, which is not one"
                                    f" of {', '.join(map(str, known))}; take another model")
        bridge = "linear" if c.get("projector_hidden_act") == "linear" else "mlp"
        words = data.Tokenizer(folder)
        with torch.device("meta"):
            eye = ViT(ViTConfig.from_hf(c.get("vision_config", {})))
            tongue = Llama(LlamaConfig.from_hf(c.get("text_config", {})))
            model = cls(eye, bridge, tongue, words, c.get("template", "v1"),
                        c.get("image_aspect_ratio", "pad"))
        if len(words) > tongue.config.vocab:
            raise data.BadModel(f"{folder}: tokenizer.json has {len(words)} tokens, the model "
                                f"{tongue.config.vocab} rows; take both from one place")
        ignore = {**ViT.IGNORE, **Llama.IGNORE}
        if bridge == "linear":
            ignore[r"multi_modal_projector\.linear_2\..*"] = "the identity, see save_pretrained"
        return data.fill(model, cls.names(eye, tongue, bridge), data.load_weights(folder),
                         ignore).eval()

    def config(self):
        """The dict of config.json, as transformers' LlavaConfig reads it."""
        return {
            "model_type": "llava", "architectures": ["LlavaForConditionalGeneration"],
            "image_token_index": self.image_token, "image_seq_length": self.patches,
            "projector_hidden_act": "gelu" if self.kind == "mlp" else "linear",
            "multimodal_projector_bias": True, "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default", "tie_word_embeddings": False,
            "text_config": self.llm.config.to_hf(), "vision_config": self.vision.config.to_hf(),
            "template": self.template, "image_aspect_ratio": self.aspect}

    @property
    def pad_token(self):
        """Id of `<pad>` in the files: the next one, if the tokenizer has none yet."""
        return self.words.added("<pad>", max(len(self.words), self.image_token + 1))

    @property
    def image_token(self):
        """Id of `<image>` in the files; ours is data.IMAGE, which is in no vocabulary."""
        return self.words.added("<image>", len(self.words))

    def save_pretrained(self, folder):
        """Everything that transformers.LlavaForConditionalGeneration and its processor read.

        The linear bridge is written as two layers, the second the identity, the activation
        "linear": the one form of it that transformers can express."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = data.export(self, self.names(self.vision, self.llm, self.kind))
        if self.kind == "linear":
            C = self.llm.config.width
            tensors["multi_modal_projector.linear_2.weight"] = torch.eye(C)
            tensors["multi_modal_projector.linear_2.bias"] = torch.zeros(C)
        data.save_weights(folder, tensors)
        picture = {"size": {"shortest_edge": self.image_size}, "do_center_crop": True,
                   "crop_size": {"height": self.image_size, "width": self.image_size},
                   "do_resize": True, "resample": 3, "do_rescale": True, "do_normalize": True,
                   "rescale_factor": 1 / 255, "image_mean": list(data.MEAN),
                   "image_std": list(data.STD), "do_convert_rgb": True,
                   "do_pad": self.aspect == "pad", "image_processor_type": "LlavaImageProcessor"}
        shared = {"processor_class": "LlavaProcessor", "patch_size": self.vision.config.patch,
                  "vision_feature_select_strategy": "default", "image_token": "<image>",
                  "num_additional_image_tokens": 1}
        files = {"config.json": self.config(), "preprocessor_config.json": picture,
                 "processor_config.json": {**shared, "image_processor": picture},
                 # quirk: sampling settings with do_sample off make transformers refuse to save
                 "generation_config.json": {"bos_token_id": self.words.bos, "do_sample": False,
                                            "eos_token_id": self.words.eos,
                                            "pad_token_id": self.pad_token}}
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")
        (folder / "chat_template.jinja").write_text(data.chat_template(self.template))
        data.save_tokenizer(self.words, folder, ("<image>", "<pad>"))


if __name__ == "__main__":
    toy = Path(__file__).parent / "weights/toy"
    vlm = VLM.from_parts(toy / "clip", toy / "llama")
    row, target = data.encode([{"from": "human", "value": "<image>\nWhat colour is the star?"},
                               {"from": "gpt", "value": "The star is red."}], "v1", vlm.words)
    grey = torch.zeros(1, 3, vlm.image_size, vlm.image_size)
    x, y, _ = vlm.embed(torch.tensor([row]), grey, torch.tensor([target]))
    print(f"{len(row)} ids -> {tuple(x.shape)} vectors, {int((y != data.IGNORE).sum())} learned")
    spans = " ".join("[picture]" if i == data.IMAGE else vlm.words.decode([i]) for i in row)
    print(spans)
