"""data.py: a conversation becomes ids and labels, a photo becomes pixels, samples become a batch.

    conversation.json -- read_conversations -+
    tokenizer.json ----- Tokenizer ----------+- encode --- ids    (T)  -200 where a picture goes
                                                       +-- labels (T)  -100 where there is no loss
    photo.jpg ---------- load_image -- preprocess -------- pixels (n, 3, S, S), n tiles

A language model predicts every next token; a chat model learns only what an assistant says. Each
token has a label: its own id, or IGNORE where it has no loss. Loss in [brackets]; v1, for stage 2:

    <s>{system} USER: <image>⏎What is it? ASSISTANT:[ A cat.</s>]USER: Sure? ASSISTANT:[ Yes.</s>]

    plain, minigpt4_caption   <s><image>[a cat⏎]                stage 1 of LLaVA, of MiniGPT-4
    blip2                     <image>[<s>][a cat⏎]              stage 2 (stage 1 has no LLaMA)
    instructblip              <image><s>Why?[A cat.</s>]
    minigpt4                  <s>###Human: <Img><image></Img> Why? ###Assistant: [A cat.###]

A template writes a conversation as segments. Their texts are joined, cut only at pictures and BOS,
and tokenized. A token has loss if its first character lies in a segment with loss, so labels cannot
drift from ids. The model puts pictures' vectors at -200, and predicts the token t at token t-1.

A picture becomes (x/255 - mean) / std after Pillow's bicubic resize, the same bits as CLIP's own:

    square  short side to S, centre crop         stage 1 of LLaVA-1.5
    pad     mean-coloured square, then square    stage 2 of LLaVA-1.5, and inference
    anyres  whole picture squashed to SxS, then the tiles of the best grid     LLaVA-NeXT
    squash  straight to SxS, whatever its shape                                BLIP-2, MiniGPT-4

    python data.py                              one conversation, its tokens with loss in [ ]
    python data.py show FILE --sample 3         the same for the third row of a file
    python data.py check FILE --images DIR      all that would stop training, a line a fault

Letters: B batch, T tokens, S picture side, n tiles. quirk: odd, but so in LLaVA (commit c121f04).
Next: train.py, which trains on these rows.
"""
import runpy
import sys

if __name__ == "__main__" and sys.argv[1:]:     # check, show: the dataset doctor, which exits
    runpy.run_module("trainer.doctor", run_name="__main__", alter_sys=True)

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from formats import templates
from formats.anyres import ANYRES_GRIDS, cut_tiles
from formats.chat_templates import ChatTemplate
from formats.conversations import IMAGE_TOKEN
from formats.errors import BadData, printable, UsageError
from formats.length_groups import length_grouped_indices
from formats.pictures import check_pixels, pad_to_square
from formats.processors import MEAN, STD
from formats.tokenizers import TokenizerFile
from formats.turns import prompt_turns, training_turns

# What stands in formats/, and is used as data.NAME all the same.
from formats.anyres import anyres_grid                                  # noqa: F401
from formats.checkpoints import load_weights                            # noqa: F401
from formats.conversations import question, read_conversations          # noqa: F401
from formats.errors import BadImage, BadModel                           # noqa: F401
from formats.pictures import load_image                                 # noqa: F401
from formats.templates import end_ids, stop_text                        # noqa: F401

IMAGE, IGNORE = -200, -100      # in no vocabulary: the place of a picture, and "no loss here"
PAD = (122, 116, 104)           # colour around a picture. quirk: 255 * MEAN cut, not rounded


# ---------------------------------------------------------------- text to ids

class Tokenizer(TokenizerFile):
    """The tokenizer of a model folder. .bos .eos .pad .unk: ids or None; len(): vocabulary size.

    LLaMA writes a space as ▁ and puts one before a text. Before which texts, .prefix says:
        every   each stretch between special tokens (older files) </s>USER -> </s> ▁US ER
        first   only the very start                               </s>USER -> </s> USER
    tokenizer.json and its config often disagree about it, so formats/tokenizers.py takes the rule
    out of the library, and it is applied here, where it can be seen."""

    def encode_with_offsets(self, text, special=True, prefix=None) -> list[tuple[int, int]]:
        """[(id, index of its first character)] without BOS.
        special: True parses "</s>" in the text as the official code does, False never does, and
        a function of the match says which. prefix: another rule than the tokenizer's own."""
        pairs, start, rule = [], 0, prefix or self.prefix

        def encode_span(end):               # text[start:end], in which nothing is special
            space = rule == "every" or rule == "first" and start == 0
            if start < end:
                for token, first in self.library_pairs(" " * space + text[start:end]):
                    pairs.append((token, start + max(0, first - space)))    # it is not in text

        for match in self.special_pattern.finditer(text):
            if special is True or special and special(match):
                encode_span(match.start())
                pairs.append((self.added(match.group()), match.start()))
                start = match.end()
        encode_span(len(text))
        return pairs

    def encode(self, text: str, bos: bool = True, special: bool = True) -> list[int]:
        """Ids of the text, after BOS if wanted and in use. special=False: no control tokens."""
        ids = [token for token, _ in self.encode_with_offsets(text, special)]
        if bos and self.add_bos:
            ids.insert(0, self.bos)
        return ids

    def decode(self, ids, skip_special: bool = True) -> str:
        """Text of the ids; pictures (negative ids) and unknown ids are left out."""
        known = [i for i in map(int, ids) if 0 <= i < self.size]
        return self.library_decode(known, skip_special)


# ---------------------------------------------------------------- templates: turns to segments

class Segment(NamedTuple):
    """A stretch of a conversation's text."""
    text: str
    learn: bool = False         # do its tokens have loss?
    typed: bool = False         # from the data, not the template: no control tokens in a prompt
    start: str = ""             # "bos": BOS before it; "text": tokenized as a text of its own


@dataclass(frozen=True)
class Template:
    """How one model family writes a conversation: a row of formats/templates.py."""
    style: str                          # a key of STYLES
    system: str                         # "A chat between a curious user and an ...", or ""
    roles: tuple                        # ("USER", "ASSISTANT")
    sep: str                            # " ", after the system text and every question
    end: str                            # "</s>", after every answer
    stop: str                           # where generation stops: the end, but for a last newline
    image_text: str = IMAGE_TOKEN       # what stands for <image> in training
    image_first: bool = False           # the picture stands before BOS
    header: str = ""                    # style chat: what opens the system text
    typed_system: bool = False          # `system` came with the conversation


TEMPLATES = {name: Template(**row) for name, row in templates.ROWS.items()}


def template_of(name: str) -> Template:
    """The Template of a name, or of a folder's own chat template that is none of ours."""
    return Template(**templates.row_of(name))


def plain(turns, t, training):
    """A picture and its caption: stage 1. quirk: the human turn's words are thrown away."""
    yield Segment(IMAGE_TOKEN)
    if t.image_first:           # quirk: BLIP-2's BOS has loss, at the picture's last vector
        yield Segment("", learn=training, start="bos")
    if training:
        yield Segment(turns[1][1], learn=True, typed=True)
        yield Segment(t.end, learn=True)


def two(turns, t, training):
    """Vicuna's style: system text, then "USER: question ASSISTANT: answer</s>"."""
    yield Segment(t.system, typed=t.typed_system)
    yield Segment(t.sep)
    for is_answer, text in turns:
        yield Segment(f"{t.roles[is_answer]}:")
        if text:                                # quirk: an empty turn has no end token
            yield Segment(" ", learn=is_answer)
            yield Segment(text, learn=is_answer, typed=True)
            yield Segment((t.sep, t.end)[is_answer], learn=is_answer)


STYLES = {"plain": plain, "two": two, **templates.STYLES}       # chat, llama2, minigpt4 ...


def segments(turns, t: Template, training: bool) -> list[Segment]:
    """The segments of [(is it an answer?, text)]; their texts join to the whole conversation."""
    style = STYLES[t.style]
    if t.style == "single" and not training:    # quirk: LLaVA v0 is asked in another style
        style = two
    found = [Segment(*segment) for segment in style(turns, t, training)]
    if not t.image_first:
        found.insert(0, Segment("", start="bos"))
    return found


# ---------------------------------------------------------------- segments to ids and labels

def tokenize_segments(segments, tokenizer, pictures: int = -1, special: bool = True):
    """Ids and labels, lists of one length T, built side by side.
    pictures: so many <image>, from the first on, are pictures, the rest letters; -1: all are.
    special=False: no control token comes out of what a person typed."""
    text, learn, typed = "", bytearray(), bytearray()       # two flags for each character
    cuts = []                   # (position, characters to pass over, id put there, has it loss?)
    for segment in segments:
        if segment.start == "bos" and tokenizer.add_bos:
            cuts.append((len(text), 0, tokenizer.bos, segment.learn))
        elif segment.start:
            cuts.append((len(text), 0, None, False))
        for mark in re.finditer(IMAGE_TOKEN, segment.text):
            if pictures != 0:
                cuts.append((len(text) + mark.start(), len(IMAGE_TOKEN), IMAGE, False))
                pictures -= 1
        text += segment.text
        learn += bytes([segment.learn]) * len(segment.text)
        typed += bytes([segment.typed]) * len(segment.text)
    cuts.append((len(text), 0, None, False))
    ids, labels, start = [], [], 0

    def may_be_special(match):
        return special or not any(typed[start + match.start():start + match.end()])

    # quirk: the text between two pictures is tokenized as if it stood alone, prefix space included
    for position, width, put, put_has_loss in cuts:
        for token, offset in tokenizer.encode_with_offsets(text[start:position], may_be_special):
            ids.append(token)
            labels.append(token if learn[start + offset] else IGNORE)
        if put is not None:
            ids.append(put)
            labels.append(put if put_has_loss else IGNORE)
        start = position + width
    return ids, labels


def training_segments(conversation, template, has_image) -> tuple[Template, list]:
    """The template, and the sample's segments. BadData if the template has no place for a turn."""
    t, turns = training_turns(conversation, template, TEMPLATES, int(has_image))
    return t, segments(turns, t, training=True)


def encode(conversation, template: str, tokenizer, has_image: bool | int = True):
    """One training sample: (ids, labels), lists of one length T (llava/train/train.py).

    conversation: [{"from": "human" | "gpt" | "system", "value": str}].
    has_image: how many <image> are pictures (True: one); without a picture they are letters.
    Equal to the official code where that prints no warning and the text holds no </s> or role
    marker. After its warning nothing has loss; here the answers have. In mpt and chatml the end of
    an answer has loss, which the official mask misses by one token."""
    t, parts = training_segments(conversation, template, has_image)
    if has_image:
        return tokenize_segments(parts, tokenizer)
    ids, labels = tokenize_segments(parts, tokenizer, pictures=0)
    if t.style == "single":
        labels = templates.shift_labels_over_pad(ids, labels, tokenizer.pad, IGNORE)
    return ids, labels


def prompt_segments(conversation, template) -> list[Segment]:
    t, turns = prompt_turns(conversation, template, TEMPLATES)
    return segments(turns, t, training=False)


def prompt(conversation, template: str) -> str:
    """The generation prompt, ending where the model starts to write (llava/conversation.py).
    quirk: mmtag templates do not wrap <image> here."""
    if isinstance(template, ChatTemplate):      # a folder's own, which is none of ours
        return template.prompt(conversation)
    return "".join(segment.text for segment in prompt_segments(conversation, template))


def prompt_tokens(conversation, template: str, tokenizer, pictures: int = -1) -> list[int]:
    """Ids of `prompt`, in which nothing that people typed can become a control token.
    pictures: the first so many <image> are pictures, those behind them were typed; -1: all are."""
    if isinstance(template, ChatTemplate):      # ids as transformers' processor gives them
        return template.prompt_tokens(conversation, tokenizer, pictures, IMAGE)
    parts = prompt_segments(conversation, template)
    return tokenize_segments(parts, tokenizer, pictures, special=False)[0]


def prompt_ids(text: str, tokenizer, special: bool = True) -> list[int]:
    """Ids of a text in which <image> stands for a picture (official tokenizer_image_token)."""
    parts = [Segment("", start="bos"), Segment(text, typed=True)]
    return tokenize_segments(parts, tokenizer, special=special)[0]


# ---------------------------------------------------------------- samples to a batch

def collate(pairs, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[(ids, labels)] of any lengths -> ids (B, T), labels (B, T), int64, padded on the right."""
    if not pairs:
        raise BadData("an empty batch: there is nothing to train on")
    ids, labels = zip(*pairs)
    return (pad_sequence(list(map(torch.tensor, ids)), batch_first=True, padding_value=pad),
            pad_sequence(list(map(torch.tensor, labels)), batch_first=True, padding_value=IGNORE))


def pack(lengths, size: int) -> list[list[int]]:
    """Sample numbers in rows whose lengths add up to at most `size`: first fit, longest first.
    Equal lengths keep their order.     pack([3, 5, 2, 4], 7) = [[1, 2], [3, 0]]"""
    rows, room = [], []                             # room: what is left of each row
    for i in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if lengths[i] > size:
            raise BadData(f"{lengths[i]:,} tokens do not fit into a row of {size:,}")
        row = 0
        while row < len(rows) and room[row] < lengths[i]:
            row += 1
        if row == len(rows):                        # no row has room for it: a new one
            rows.append([])
            room.append(size)
        rows[row].append(i)
        room[row] -= lengths[i]
    return rows


def modality_order(lengths, batch: int, world_size: int, rng) -> list[int]:
    """One epoch's order of samples in stage 2 of LLaVA-1.5 (llava/train/llava_trainer.py).
    lengths: words of each sample, negative without a picture. A step of world_size * batch samples
    holds pictures only or text only. quirk: the last step of each kind, full or not, goes to the
    end, both in one, in the order of the file."""
    if 0 in lengths:
        raise BadData(f"sample number {lengths.index(0)} of the data has no words: take it out")
    with_picture = [i for i, length in enumerate(lengths) if length > 0]
    text_only = [i for i, length in enumerate(lengths) if length < 0]
    if not with_picture or not text_only:
        return length_grouped_indices(lengths, batch, world_size, rng)
    steps, rest, size = [], [], batch * world_size
    for kind in (with_picture, text_only):
        words = [abs(lengths[i]) for i in kind]
        order = [kind[at] for at in length_grouped_indices(words, batch, world_size, rng)]
        last = (len(order) - 1) // size * size      # where the last step begins
        for first in range(0, last, size):
            steps.append(order[first:first + size])
        rest += order[last:]
    mixed = []
    for step in torch.randperm(len(steps), generator=rng).tolist():
        mixed += steps[step]
    return mixed + sorted(rest)


# ---------------------------------------------------------------- pictures

def clip_normalize(image, size) -> np.ndarray:
    """CLIP's own steps on an RGB picture: (3, size, size) float32."""
    w, h = image.size
    short = min(w, h)
    new = int(size * w / short), int(size * h / short)      # the short side becomes `size`
    check_pixels(*new)
    if new != image.size:
        image = image.resize(new, Image.Resampling.BICUBIC)
    left, top = (new[0] - size) // 2, (new[1] - size) // 2  # centre crop
    x = np.asarray(image.crop((left, top, left + size, top + size)))    # (size, size, 3) uint8
    x = (x * (1 / 255)).astype(np.float32)              # quirk: scaled in float64, then rounded
    return ((x - np.float32(MEAN)) / np.float32(STD)).transpose(2, 0, 1)


def preprocess(image: Image.Image, size: int = 336, aspect: str = "pad",
               grids: tuple = ANYRES_GRIDS) -> torch.Tensor:
    """Pixels (n, 3, size, size) float32; n = 1, or 1 + tiles for anyres, the overview first.
    aspect: square | pad | squash | anyres, with grids as in `anyres_grid`. Pillow's bicubic on
    uint8 is the reference: a resize of tensors is close but not equal."""
    if image.mode != "RGB":                 # a copy would take 4 bytes a pixel
        image = image.convert("RGB")
    if aspect == "square":
        tiles = [image]                             # clip_normalize crops it
    elif aspect == "pad":
        tiles = [pad_to_square(image, PAD)]
    elif aspect == "squash":
        tiles = [image.resize((size, size), Image.Resampling.BICUBIC)]
    elif aspect == "anyres":
        tiles = cut_tiles(image, size, grids)       # the overview, then the tiles row by row
    else:
        raise UsageError(f"aspect {aspect!r} is unknown: choose square, pad, squash or anyres")
    return torch.from_numpy(np.stack([clip_normalize(tile, size) for tile in tiles]))


# ---------------------------------------------------------------- look

def colour_labels(ids, labels, tokenizer: Tokenizer, *image_names: str) -> str:
    """The tokens in a row, those with loss green on a terminal, in [brackets] elsewhere; for each
    picture the next of `image_names`, or <image> where none is left."""
    on, off = "[", "]"
    if sys.stdout.isatty():
        on, off = "\033[32m", "\033[0m"
    names, tokens = iter(image_names), []
    for i, label in zip(ids, labels):
        text = next(names, IMAGE_TOKEN) if i == IMAGE else tokenizer.token(i).replace("\n", "⏎")
        tokens.append(printable(text) if label == IGNORE else on + printable(text) + off)
    return " ".join(tokens)


def show_batch(pairs, tokenizer: Tokenizer, image_tokens: int = 1, *image_names: str):
    """Print samples [(ids, labels)] as the model meets them; a picture takes `image_tokens`."""
    for ids, labels in pairs:
        print(colour_labels(ids, labels, tokenizer, *image_names))
        size = len(ids) + (image_tokens - 1) * ids.count(IMAGE)
        print(f"\n{size} tokens, {len(ids) - labels.count(IGNORE)} of them with loss (marked).")


def main():
    """Print one conversation as the model meets it."""
    talk = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."},
            {"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}]
    tokenizer = Tokenizer(Path(__file__).parent / "toy/weights/llama")
    show_batch([encode(talk, "v1", tokenizer)], tokenizer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
