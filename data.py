"""Everything that comes off a disk, turned into tensors, and refused in one line when it is bad.

    conversation.json ── read_conversations ─┐
    tokenizer.json ───── Tokenizer ──────────┴─ encode ─── ids    (T)  IMAGE: picture here
                                                       └── labels (T)  IGNORE: not learned
    photo.jpg ────────── load_image ── preprocess ──────── pixels (n, 3, S, S), n tiles
    model.safetensors ── load_weights ── fill ──────────── parameters, and `export` back again

A conversation is text with two kinds of stretches: what a person or a template wrote (read, not
learned) and what the model must say (learned). In template v1 the learned ones are in brackets:

    {system} USER: <image>⏎What is this? ASSISTANT:[ A cat.</s>]USER: Sure? ASSISTANT:[ Yes.</s>]

    plain, minigpt4_caption   <s><image>[a cat⏎]
    blip2                     <image>[<s>][a cat⏎]
    instructblip              <image><s>Why?[A cat.</s>]
    minigpt4                  <s>###Human: <Img><image></Img> Why? ###Assistant: [A cat.###]

The text is tokenised once. A token is learned if its first character lies in a learned stretch, so
labels cannot drift from ids, whatever the tokeniser merges.           labels[t] = ids[t] or IGNORE

A picture becomes (x/255 − mean) / std after Pillow's bicubic resize, equal to the bit to CLIP's:

    square  short side → S, centre crop          stage 1 of LLaVA-1.5
    pad     mean-coloured square, then square    stage 2 of LLaVA-1.5, and inference
    anyres  whole picture squashed to S×S, then the tiles of the best grid     LLaVA-NeXT
    squash  straight to S×S, whatever its shape                                BLIP-2, MiniGPT-4

Weights are safetensors only: a pickle can run code when it is opened, so none is ever opened.

    python data.py                              one conversation, its learned tokens in [ ]
    python data.py show FILE --sample 3         the same for the third row of a file
    python data.py check FILE --images DIR      all that would stop training, a line a fault

Letters: B batch, T tokens, S picture side, n tiles.   [LLaVA] 2304.08485   [LLaVA15] 2310.03744
Official behaviour: haotian-liu/LLaVA c121f04, llava/{conversation,mm_utils,train/train}.py
"""
import math
import re
import runpy
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# What has a room of its own, and is used through data all the same.
from formats.anyres import anyres_grid, ANYRES_GRIDS, TRANSPOSED  # noqa: F401
from formats.checkpoints import load_weights  # noqa: F401
from formats.conversations import (
    IMAGE_TOKEN,
    read_conversations,  # noqa: F401
    ROLES,
)
from formats.errors import BadData, BadImage, BadModel, Offline, printable, UsageError  # noqa: F401
from formats.export import chat_template
from formats.pictures import (
    check_pixels,
    load_image,  # noqa: F401
)
from formats.processors import MEAN, STD
from formats.templates import ChatTemplate, find, PROBES, recognise, special_tokens
from formats.tokenizers import read_tokenizer

IMAGE, IGNORE = -200, -100      # in no vocabulary: the picture's place, and "learn nothing"


# ---------------------------------------------------------------- text: characters to ids

class Tokenizer:
    """The tokeniser of a model folder: `tokenizer.json` beside `tokenizer_config.json`.

    .bos .eos .pad .unk: ids or None; .legacy: LLaMA's prefix rule; len(): vocabulary size.
    Raises BadModel for a file that is missing, damaged, or has ids outside its own vocabulary.

    LLaMA writes a space as ▁ and puts one before the text. Which text is the rule:
        legacy       every stretch between special tokens      </s>USER → </s> ▁US ER
        not legacy   only the very start                       </s>USER → </s> USER
    Files in the wild disagree with their own config about it, so the prefix is taken out of the
    library's pipeline and added here, where it can be seen."""

    def __init__(self, folder):
        parts = read_tokenizer(folder)                  # the file, checked
        self.folder, self.size, self._lib = Path(folder), parts.size, parts.lib
        self.prefix, self.stood, self.legacy = parts.prefix, parts.prefix_in_file, parts.legacy
        self.bos, self.eos, self.unk, self.pad = parts.bos, parts.eos, parts.unk, parts.pad
        self.add_bos, self.max_length = parts.add_bos, parts.max_length
        self.more, self._added = parts.more, parts.added
        self._look_for(parts.added)

    def _look_for(self, tokens):
        longest_first = sorted(filter(None, tokens), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def fit(self, rows: int, template: str):
        """Settle for a model of `rows` embeddings: special tokens beyond them, such as an unused
        [PAD] or <image>, are read as letters from now on. Raises BadModel if one is in use."""
        beyond = {token: i for token, i in self._lib.get_vocab().items() if i >= rows}
        if not beyond:
            return
        t, decoder = template_of(template), self._lib.get_added_tokens_decoder()
        needed = "".join((t.system, *t.roles, t.sep, t.end, getattr(template, "source", "")))
        for token, i in sorted(beyond.items()):
            unused = i in decoder and decoder[i].special and token not in needed
            if not unused or i in (self.bos, self.eos, self.unk):
                raise BadModel(f"{self.folder}: the tokenizer's {token!r} is number {i}, the model "
                               f"has {rows} rows; take both from one place")
        self._look_for(set(self._added) - set(beyond))
        self.pad = next(i for i in (self.pad, self.unk, self.eos, 0) if i is not None and i < rows)

    def __len__(self):
        return self.size

    def added(self, token: str, default=None):
        """Id of an added token such as <image>, or the default."""
        return self._added.get(token, default)

    def first_end(self, text: str, tokens_only: bool) -> str:
        """Where an answer ends that is followed by this text: at the added token that begins it,
        else, unless tokens_only, at all of it."""
        found = self._special.match(text.strip())
        return found.group() if found else "" if tokens_only else text.strip()

    def begins_special(self, text: str) -> bool:
        """Is the first token of the text an added one?"""
        return bool(self._special.match(text))

    def token(self, i: int | None) -> str | None:
        """The text of an id, as the vocabulary has it."""
        return None if i is None else self._lib.id_to_token(i)

    def encode_with_offsets(self, text: str, special=True, prefix=None) -> list[tuple[int, int]]:
        """[(id, index of its first character)] without BOS. prefix: another rule than its own.

        special: True parses "</s>" in the text as the official code does, False never does, and
        a function of the match says which. Raises BadData for text that is not Unicode."""
        allowed = special if callable(special) else lambda match: special
        out, start, prefix = [], 0, self.prefix if prefix is None else prefix

        def stretch(end):
            if end == start:
                return
            pad = prefix == "every" or (prefix == "first" and start == 0)
            try:
                coded = self._lib.encode(" " * pad + text[start:end], add_special_tokens=False)
            except TypeError:
                raise BadData("text holds half a surrogate pair: save it as valid UTF-8") from None
            for i, (first, _) in zip(coded.ids, coded.offsets):
                out.append((i, start + max(0, first - pad)))

        for match in self._special.finditer(text):
            if allowed(match):
                stretch(match.start())
                out.append((self._added[match.group()], match.start()))
                start = match.end()
        stretch(len(text))
        return out

    def encode(self, text: str, bos: bool = True, special: bool = True) -> list[int]:
        """Ids of the text, BOS first if asked and the model uses one.

        special=False: no stretch of the text can become a control token."""
        return [self.bos] * (bos and self.add_bos) + [i for i, _ in self.encode_with_offsets(text, special)]

    def decode(self, ids, skip_special: bool = True) -> str:
        """Text of the ids; places of pictures (negative ids) and unknown ids are passed over."""
        ids = [i for i in map(int, ids) if 0 <= i < self.size]
        if self.bos is not None and self.bos == self.eos == self.unk:
            ids = [i or self.eos for i in ids]      # quirk: InstructBLIP's 0 is one more </s>
        return self._lib.decode(ids, skip_special_tokens=skip_special)


# ---------------------------------------------------------------- templates

@dataclass(frozen=True)
class Template:
    """How one model family writes a conversation.

    style: two | chat | llama2 | single | plain | minigpt4 | instruct."""
    style: str
    system: str = ""
    roles: tuple = ("USER", "ASSISTANT")
    sep: str = " "                       # after the system text and every human turn
    end: str = "</s>"                    # after every answer: where generation stops
    picture: str = IMAGE_TOKEN
    front: bool = False                  # the picture stands before BOS
    given: str = ""                      # the end of `system` that a conversation brought along

    @property
    def stop(self):
        """The text at which generation stops: the end, without a newline that only follows it."""
        return self.end.rstrip("\n") or self.end

    @property
    def header(self):
        """In style chat: what stands before the system text, which is in `system` too."""
        return re.match(r"[^\n]*\n+", self.system)[0] if self.style == "chat" else ""

    @property
    def text(self):
        """The system text alone."""
        return self.system.removeprefix(self.header)

    @property
    def opening(self):
        """The system text with all that stands around it."""
        if self.style != "llama2":
            return self.system + self.sep
        return f"<<SYS>>\n{self.system}\n<</SYS>>\n\n" if self.system else ""


class _Joint(str):
    """A piece that adds no text to the others; told by identity."""


BOS, SEAM = _Joint(), _Joint()      # BOS stands here; the text goes on as if it began here

_CHAT = ("A chat between a curious {0} and an artificial intelligence assistant. The assistant "
         "gives helpful, detailed, and polite answers to the {0}'s questions.")
_SEES = ("able to understand the visual content that the user provides, and assist the user with "
         "a variety of tasks using natural language.")
# quirk: no space before "The visual content"; the models were trained on it.
_TAGS = ("A chat between a curious user and an artificial intelligence assistant. The assistant "
         f"is {_SEES}The visual content will be provided with the following format: "
         f"<Image>visual content</Image>.")
# quirk: two spaces after "while being safe."
_META = ("You are a helpful, respectful and honest assistant. Always answer as helpfully as "
         "possible, while being safe.  Your answers should not include any harmful, unethical, "
         "racist, sexist, toxic, dangerous, or illegal content. Please ensure that your responses "
         "are socially unbiased and positive in nature.\n\nIf a question does not make any sense, "
         "or is not factually coherent, explain why instead of answering something not correct. If "
         "you don't know the answer to a question, please don't share false information.")
_MPT = ("A conversation between a user and an LLM-based AI assistant. The assistant gives helpful "
        "and honest answers.")
_OLD = dict(style="single", roles=("Human", "Assistant"), sep="###", end="###")
_IM = dict(style="chat", roles=("<|im_start|>user\n", "<|im_start|>assistant\n"),
           sep="<|im_end|>", end="<|im_end|>")
_HEAD = "<|start_header_id|>{}<|end_header_id|>\n\n"
_HELPFUL = "You are a helpful language and vision assistant. You are " + _SEES
_TAG = dict(system=_TAGS, picture="<Image><image></Image>")

TEMPLATES = {
    "plain": Template("plain", end="\n"),
    "v1": Template("two", _CHAT.format("user")),
    # quirk: official command lines pick this "human" text for models trained on v1's "user".
    "llava_v1": Template("two", _CHAT.format("human")),
    "v1_mmtag": Template("two", **_TAG),
    # quirk: what the official code calls v0 (Vicuna v0) has this system text and, behind it, a long
    # question and answer about renewable energy, at inference only. LLaVA's own v0 prompts, these
    # two, have no example; LLaVA was not trained with one, so ours named v0 is llava_v0 too.
    "llava_v0": Template(system=_CHAT.format("human"), **_OLD),
    "v0_mmtag": Template(**_OLD, **_TAG),
    "llava_llama_2": Template("llama2", _HELPFUL, sep="<s>"),
    "llama_2": Template("llama2", _META, sep="<s>"),
    "mistral_instruct": Template("llama2", sep=""),
    "chatml_direct": Template(system="<|im_start|>system\nAnswer the questions.", **_IM),
    "mpt": Template(system="<|im_start|>system\n" + _MPT, **_IM),
    # Of LLaVA-NeXT's second release (LLaVA-VL/LLaVA-NeXT, llava/conversation.py). There the headers
    # of answers are learned too; here the answers with their end, as in the others.
    "llama_3": Template("chat", _HEAD.format("system") + _HELPFUL, (
        _HEAD.format("user"), _HEAD.format("assistant")), "<|eot_id|>", "<|eot_id|>"),
    "qwen_1_5": Template(system="<|im_start|>system\nYou are a helpful assistant.", **{
        **_IM, "sep": "<|im_end|>\n", "end": "<|im_end|>\n"}),
    "blip2": Template("plain", end="\n", front=True),
    "instructblip": Template("instruct", front=True),
    "minigpt4_caption": Template("plain", end="\n"),
    "minigpt4": Template("minigpt4", "Give the following image: <Img>ImageContent</Img>. You will "
                         "be able to see the image once I provide it to you. Please answer my "
                         "questions.", ("Human", "Assistant"), sep="###", end="###"),
}
TEMPLATES |= {"vicuna_v1": TEMPLATES["v1"], "v0": TEMPLATES["llava_v0"],
              "mistral_direct": TEMPLATES["chatml_direct"], "llava_llama_3": TEMPLATES["llama_3"]}


def _with_system(name: str, text: str) -> Template:
    """The template with another system text. Raises BadData where training has none."""
    t = TEMPLATES[name]
    if t.style not in ("two", "single", "chat", "llama2") or not t.system:
        raise BadData(f"template {name} has no system text, but the sample has one: take it out, "
                      "put it into the first question, or train with --template v1")
    return replace(t, system=t.header + text, given=text)       # in style chat the header stays


def parse_turns(conversation, name) -> tuple[Template, list]:
    """The template and [(is it an answer?, text)]. A first turn from "system" replaces the
    template's own system text."""
    if name not in TEMPLATES:
        raise BadData(f"template {name!r} is unknown: choose one of {', '.join(TEMPLATES)}")
    try:
        turns = [(ROLES[turn["from"]], turn["value"] or "") for turn in conversation]
    except (KeyError, TypeError) as error:
        raise BadData(f"a turn needs from (human or gpt) and value: {error!r}") from None
    t = TEMPLATES[name]
    if turns and turns[0][0] == "system":
        text = turns.pop(0)[1]
        t = _with_system(name, text) if text.strip() else t
    if any(who == "system" for who, _ in turns):
        raise BadData("a system turn behind others: put it first")
    return t, [(who == "gpt", text) for who, text in turns]


def check_turns(turns) -> list:
    turns = turns[1:] if turns and turns[0][0] else turns       # quirk: a leading answer is dropped
    for i, (answer, _) in enumerate(turns):
        if answer != bool(i % 2):
            raise BadData(f"turn {i + 1} has the wrong speaker: questions and answers must take "
                          "turns")
    return turns


def segments(turns, t: Template, training: bool):
    """Yield (text, learned?, written by a person?) whose texts join to the whole conversation."""
    own = t.system.removesuffix(t.given)        # what people gave cannot hold control tokens
    if not t.front:
        yield BOS, False, False
    if t.style == "plain":
        yield IMAGE_TOKEN, False, False                    # quirk: the human's words are thrown away
        if t.front:         # quirk: with nothing asked BOS is learned, from the last of the queries
            yield BOS, training, False
        if training:
            yield turns[1][1], True, True
            yield t.end, True, False                # a newline and no </s>   [LLaVA15] stage 1
        return
    if t.style == "instruct":
        # It knows one instruction and one answer: in a chat it is asked the last question only.
        asked = [value for answer, value in turns if not answer]
        yield IMAGE_TOKEN * (IMAGE_TOKEN in asked[0]), False, False
        yield BOS, False, False
        yield asked[-1].replace(IMAGE_TOKEN, "", len(asked) == 1).strip(), False, True
        if training:
            yield SEAM, False, False
            yield turns[1][1], True, True
            yield t.end, True, False
        return
    if t.style == "minigpt4":
        # quirk: training has no system text, but a space before ###Assistant; and the answer is
        # tokenised alone, so that a prefix space comes behind the space that stands there already
        yield "" if training else t.system, False, False
        for answer, value in turns:
            yield " " * (answer and training) + f"{t.sep}{t.roles[answer]}: ", False, False
            if IMAGE_TOKEN in value and not answer:
                yield f"<Img>{IMAGE_TOKEN}</Img> ", False, False
                value = value.replace(IMAGE_TOKEN, "", 1).strip()
            if answer and training:
                yield SEAM, False, False
            yield value, answer, True
        yield t.end * training, True, False
        return
    if t.style == "single" and training:
        # quirk: training writes "### Role: text⏎", generation "###Role: text" as in `two`. The ###
        # that opens a human turn is learned: it is how the model comes to stop.
        yield own, False, False
        yield t.given, False, True
        yield "\n\n", False, False
        for answer, value in turns:
            yield "###", True, False
            yield f" {t.roles[answer]}: ", answer, False
            yield value, answer, True
            yield "\n", answer, False
        yield "### ", True, False
        return
    if t.style != "llama2":
        yield own, False, False
        yield t.given, False, True
        yield t.sep, False, False
    for i, (answer, value) in enumerate(turns):
        if t.style == "llama2":
            before = " " if answer else t.sep * (i > 0) + "[INST] "
            if t.system and i == 0:
                yield before + "<<SYS>>\n" + own, False, False
                yield t.given, False, True
                before = "\n<</SYS>>\n\n"
            after = " " + t.end if answer else " [/INST]"
        else:
            colon = "" if t.style == "chat" else ":"
            yield t.roles[answer] + colon, False, False
            before, after = colon and " ", t.end if answer else t.sep
        if value:                  # quirk: an empty turn has no end token, so it teaches nothing
            yield before, answer, False
            yield value, answer, True
            yield after, answer, False


def tokenize_segments(pieces, tokenizer, pictures=-1, special=True) -> tuple[list, list]:
    """Pieces to (ids, learned flags). pictures: so many <image> are pictures, the rest text; -1:
    all are. special=False: what people wrote stays plain text."""
    text, learned, human, joints = "", bytearray(), bytearray(), []
    for piece, learn, person in pieces:
        if piece is BOS or piece is SEAM:
            joints.append((len(text), piece, learn))
        text += piece
        learned += bytes([learn]) * len(piece)
        human += bytes([person]) * len(piece)
    marks = [(found.start(), IMAGE_TOKEN, False) for found in re.finditer(IMAGE_TOKEN, text)]
    joints += marks if pictures < 0 else marks[:pictures]
    ids, flags, at = [], [], 0
    # quirk: the text between two pictures is tokenised as if it stood alone, prefix space included.
    for end, joint, learn in sorted(joints, key=lambda j: j[0]) + [(len(text), SEAM, False)]:
        for token, start in tokenizer.encode_with_offsets(
                text[at:end], lambda m: special or not any(human[at + m.start():at + m.end()])):
            ids.append(token)
            flags.append(bool(learned[at + start]))
        at = end + len(joint)
        if joint is BOS and tokenizer.add_bos or joint is IMAGE_TOKEN:
            ids.append(IMAGE if joint is IMAGE_TOKEN else tokenizer.bos)
            flags.append(learn)
    return ids, flags


def prompt_ids(text: str, tokenizer, special: bool = True) -> list[int]:
    """Ids of a text in which <image> stands for a picture (official tokenizer_image_token)."""
    return tokenize_segments([(BOS, False, False), (text, False, True)], tokenizer, special=special)[0]


def prompt_segments(conversation, template):
    t, turns = parse_turns(conversation, template)
    turns = turns + [(True, "")] if turns and not turns[-1][0] else turns
    turns = turns if t.style == "plain" else check_turns(turns)
    if not turns or t.style == "llama2" and not turns[0][1]:
        raise BadData("a conversation must open with something a human says")
    if IMAGE_TOKEN in t.system:
        raise BadData(f"{IMAGE_TOKEN} in the system text: move it into a question")
    return list(segments(turns, t, training=False))


def prompt(conversation, template: str) -> str:
    """The generation prompt, ending where the model starts to write (llava/conversation.py).

    A last gpt turn may be absent or None. quirk: mmtag templates do not wrap <image> here."""
    if isinstance(template, ChatTemplate):
        return "".join(text for text, _ in _own_pieces(conversation, template))
    return "".join(text for text, _, _ in prompt_segments(conversation, template))


def prompt_tokens(conversation, template: str, tokenizer, pictures: int = -1) -> list[int]:
    """Ids of `prompt`, in which nothing that people typed can become a control token.

    pictures: so many <image> are pictures, those behind them were typed; -1: all are."""
    if isinstance(template, ChatTemplate):
        return _own_ids(_own_pieces(conversation, template, pictures), tokenizer)
    return tokenize_segments(prompt_segments(conversation, template), tokenizer, pictures, special=False)[0]


def question(conversation) -> str:
    """What a person says last, as it was typed: what an InstructBLIP's Q-Former reads."""
    asked = [turn["value"] for turn in conversation if ROLES[turn["from"]] == "human"]
    return (asked[-1] or "").replace(IMAGE_TOKEN, "").strip() if asked else ""
_SAID_BY = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
            "system": "system"}


def _own_pieces(conversation, chat: ChatTemplate, pictures: int = -1) -> list:
    """[(text, did a person type it?)] of the prompt that a folder's own chat template writes.

    The first `pictures` of the <image> in questions are pictures (-1: all), the rest letters."""
    turns = []
    for turn in conversation:
        try:
            role, text = _SAID_BY[turn["from"]], turn["value"] or ""
        except (KeyError, TypeError) as error:
            raise BadData(f"a turn needs from (human or gpt) and value: {error!r}") from None
        found = text.split(IMAGE_TOKEN, pictures) if role == "user" and pictures else [text]
        pictures -= (len(found) - 1) * (pictures > 0)
        parts = found[:1]
        for part in found[1:]:              # the template itself writes a newline behind a picture
            parts += [None, part.removeprefix("\n")]
        turns.append((role, [part for part in parts if part != ""]))
    if turns and turns[-1] == ("assistant", []):        # the answer that is wanted
        turns.pop()
    if not turns or turns[-1][0] != "user":
        raise BadData("a conversation must end with something a human says")
    return chat.pieces(turns)


def _own_ids(pieces, tokenizer) -> list[int]:
    """Ids as transformers' processor makes them: <image> is a token among the others, and BOS comes
    first where the text does not begin with it already. What people typed is letters."""
    def coded(some):
        text, human = "".join(piece for piece, _ in some), bytearray()
        for piece, person in some:
            human += bytes([person]) * len(piece)
        return [i for i, _ in tokenizer.encode_with_offsets(
            text, lambda m: not any(human[m.start():m.end()]), tokenizer.stood)]

    mark, ids, rest = tokenizer.added(IMAGE_TOKEN), [], []
    if mark is not None:
        ids = [IMAGE if i == mark else i for i in coded(pieces)]
    else:                                   # a tokenizer without the token: cut there ourselves
        for piece, person in pieces:
            first, *more = [piece] if person else piece.split(IMAGE_TOKEN)
            rest.append((first, person))
            for part in more:
                ids += [*coded(rest), IMAGE]
                rest = [(part, False)]
        ids += coded(rest)
    return ids if not tokenizer.add_bos or ids[:1] == [tokenizer.bos] else [tokenizer.bos, *ids]


def template_of(name: str) -> Template:
    """The Template of a name, or, of a folder's own chat template that is none of ours, one that
    tells only that people and the model talk in turns."""
    return TEMPLATES.get(name) or Template("own", end=getattr(name, "end", ""))


def end_ids(template: str, words: Tokenizer) -> set[int]:
    """Ids that end an answer: the tokenizer's EOS, and the end of the template if it is a token."""
    stop = template_of(template).stop
    last = words.added(stop)
    if stop == "\n":                        # a caption's end is a byte token behind a prefix
        last = words.encode("\n", bos=False)[-1]
    return {words.eos, last, words.added(getattr(template, "end", ""))} - {None}


def stop_text(template: str, words: Tokenizer) -> str | None:
    """The text that ends an answer, where the template has an end that is no token."""
    stop = template_of(template).stop
    return stop if stop not in ("", "\n") and words.added(stop) is None else None


def folder_template(folder, words: Tokenizer) -> str | None:
    """The template in which a folder's own chat template asks: a name of ours, or a ChatTemplate;
    None if the folder has none. One that cannot be rendered says so when it is used."""
    if not (found := find(folder)):
        return None
    source = found[0]
    for name in TEMPLATES:
        if source in (chat_template(TEMPLATES[name]), chat_template(TEMPLATES[name], words)):
            return name
    special = {"bos_token": words.token(words.bos), "eos_token": words.token(words.eos)}
    special = {name: token for name, token in special.items() if token is not None}
    chat = ChatTemplate.of(source, found[1], special | special_tokens(folder))
    ours = {}
    for name, t in TEMPLATES.items():
        if t.style in ("two", "chat", "llama2", "single"):
            talks = [[{"from": role, "value": "".join(
                f"{IMAGE_TOKEN}\n" if part is None else part for part in parts)}
                for role, parts in turns] for turns in PROBES]
            ours[name] = t.opening, [prompt(talk, name) for talk in talks]
    try:
        chat = recognise(chat, ours, special.get("bos_token", "") if words.add_bos else "")
        if isinstance(chat, ChatTemplate):
            chat.end = words.first_end(chat.after_an_answer(), chat.known)
    except (ValueError, TimeoutError):          # said when it is used: --template may be given
        pass
    return chat


def training_segments(conversation, template, has_image) -> tuple[Template, list]:
    """The first half of `encode`: the template, and `_pieces` of a sample that it can hold."""
    t, turns = parse_turns(conversation, template)
    pictures = int(has_image)
    if t.style not in ("single", "plain"):
        turns = check_turns(turns)
    if pictures > 1 and t.style in ("plain", "minigpt4", "instruct"):
        raise BadData(f"template {template} holds one picture, not {pictures}: split the sample, "
                      "or train with --template v1")
    if t.style == "plain" and not (pictures and [answer for answer, _ in turns] == [False, True]
                                   and IMAGE_TOKEN in turns[0][1]):
        raise BadData(f"template {template} needs <image> in one human turn, and one gpt turn: a "
                      "caption")
    if t.style in ("instruct", "minigpt4") and (
            len(turns) != 2 or IMAGE_TOKEN in turns[0][1] and not pictures):
        raise BadData(f"template {template} is learned from one question and one answer, and "
                      "<image> in it needs a picture; split or correct the sample")
    if t.style == "llama2" and not (turns and turns[0][1]):
        raise BadData("the first human turn is empty: give the question")
    if pictures and IMAGE_TOKEN in t.system:
        raise BadData(f"{IMAGE_TOKEN} in the system text: move it into a question")
    if pictures == 1:   # the picture comes first in its turn, and twice in one turn is once
        turns = [(a, f"{IMAGE_TOKEN}\n{v.replace(IMAGE_TOKEN, '').strip()}".strip() if IMAGE_TOKEN in v else v)
                 for a, v in turns]
    if pictures:
        turns = [(a, v.replace(IMAGE_TOKEN, t.picture)) for a, v in turns]
    return t, list(segments(turns, t, training=True))


def encode(conversation, template: str, tokenizer, has_image: bool | int = True
           ) -> tuple[list[int], list[int]]:
    """One training sample: (ids, labels), lists of equal length T (llava/train/train.py).

    conversation: [{"from": "human"|"gpt", "value": str}]; user and assistant are accepted too, and
    a first turn from "system", which replaces the template's own system text.
    has_image: <image> marks the picture; otherwise it is ordinary text. A number: so many pictures;
    from two on each <image> stays where it stands, one for each picture.
    Equal to the official code wherever that prints no warning, save where the text itself holds
    </s> or a role marker. Where it warns of a mismatch it learns nothing; here the answers are
    learned, unless official_quirks asks for its behaviour.
    mpt and chatml learn the answers with their end, which the official arithmetic misses by one.
    Raises BadData for an unknown template or role, or speakers that do not alternate."""
    t, pieces = training_segments(conversation, template, has_image)
    return label_segments(t, pieces, tokenizer, int(has_image))


def label_segments(t, pieces, tokenizer, pictures) -> tuple[list[int], list[int]]:
    """The second half of `encode`: (ids, labels) of the pieces."""
    count = -1 if pictures else 0
    ids, flags = tokenize_segments(pieces, tokenizer, count)
    if t.style == "single" and not pictures:
        # quirk: text-only lengths leave out the pad token (= <unk>), so an <unk> typed in the text
        # shifts every later label by one to the left.
        kept = [flag for i, flag in zip(ids, flags) if i != tokenizer.pad]
        flags = kept + [True] * (len(ids) - len(kept))
    return ids, [i if flag else IGNORE for i, flag in zip(ids, flags)]


# ---------------------------------------------------------------- may a sample be trained on?


def collate(pairs, pad: int) -> tuple[Tensor, Tensor]:
    """[(ids, labels)] of any lengths → ids (B, T), labels (B, T), int64, padded on the right."""
    if not pairs:
        raise BadData("an empty batch: there is nothing to train on")
    T = max(len(ids) for ids, _ in pairs)
    rows = [(list(i) + [pad] * (T - len(i)), list(l) + [IGNORE] * (T - len(l))) for i, l in pairs]
    return torch.tensor([i for i, _ in rows]), torch.tensor([l for _, l in rows])


# ---------------------------------------------------------------- which samples stand together

def pack(lengths, size: int) -> list[list[int]]:
    """Sample numbers in rows whose lengths add up to at most `size`: first fit, longest first.

    pack([3, 5, 2, 4], 7) = [[1, 2], [3, 0]]. Equal lengths keep their order, so the rows are a
    function of the lengths. Raises BadData for a length that is over `size`."""
    rows, room = [], []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[i] > size:
            raise BadData(f"{lengths[i]:,} tokens do not fit into a row of {size:,}")
        at = next((r for r, left in enumerate(room) if left >= lengths[i]), len(rows))
        if at == len(rows):
            rows.append([])
            room.append(size)
        rows[at].append(i)
        room[at] -= lengths[i]
    return rows


def length_grouped_indices(lengths, batch, ranks, dice) -> list[int]:
    """A random order in which steps of ranks · batch samples are dealt to ranks of equal work."""
    shuffled, out = torch.randperm(len(lengths), generator=dice).tolist(), []
    for first in range(0, len(shuffled), batch * ranks):
        step = sorted(shuffled[first:first + batch * ranks], key=lambda i: -lengths[i])
        if len(step) % ranks:                           # quirk: a short step is dealt in turn
            hands = [step[r::ranks] for r in range(ranks)]
        else:                                           # the next goes to the shortest hand
            hands, sums = [[] for _ in range(ranks)], [0] * ranks
            for i in step:
                at = sums.index(min(sums))
                hands[at].append(i)
                sums[at] = math.inf if len(hands[at]) == len(step) // ranks else (
                    sums[at] + lengths[i])
        out += [i for hand in hands for i in hand]
    return out

def modality_order(lengths, batch: int, ranks: int, dice) -> list[int]:
    """One epoch's order of samples in stage 2 of LLaVA-1.5 (llava/train/llava_trainer.py).

    lengths: words of each sample, negative without a picture. Steps of ranks · batch samples hold
    pictures only or text only, of like length on all ranks. quirk: the last step of each kind, full
    or not, goes to the end, both in one, in the order of the file."""
    if 0 in lengths:
        raise BadData(f"sample number {lengths.index(0)} of the data has no words: take it out")
    kinds = [[i for i, n in enumerate(lengths) if (n > 0) == picture] for picture in (True, False)]
    if not all(kinds):
        return length_grouped_indices(lengths, batch, ranks, dice)
    steps, rest, size = [], [], batch * ranks
    for kind in kinds:
        order = [kind[i] for i in length_grouped_indices([abs(lengths[i]) for i in kind], batch, ranks, dice)]
        cut = [order[i:i + size] for i in range(0, len(order), size)]
        steps += cut[:-1]
        rest += cut[-1]
    mixed = [steps[i] for i in torch.randperm(len(steps), generator=dice).tolist()]
    return [i for step in mixed for i in step] + sorted(rest)


# ---------------------------------------------------------------- pictures

PAD = (122, 116, 104)               # quirk: 255 × MEAN cut to integers, not rounded


def clip_normalize(image, size) -> np.ndarray:
    """CLIP's own steps on an RGB picture: (3, size, size) float32."""
    w, h = image.size
    short = min(w, h)
    new = (size, int(size * h / short)) if w <= h else (int(size * w / short), size)
    check_pixels(*new)
    if new != image.size:
        image = image.resize(new, Image.Resampling.BICUBIC)
    left, top = (new[0] - size) // 2, (new[1] - size) // 2
    x = np.asarray(image.crop((left, top, left + size, top + size)))
    x = (x * (1 / 255)).astype(np.float32)              # quirk: scaled in float64, then rounded
    return ((x - np.float32(MEAN)) / np.float32(STD)).transpose(2, 0, 1)


def preprocess(image: Image.Image, size: int = 336, aspect: str = "pad",
               grids: tuple = ANYRES_GRIDS) -> Tensor:
    """Pixels (n, 3, size, size) float32; n = 1, or 1 + tiles for anyres, the overview first.

    aspect: square | pad | squash | anyres, with grids as in `anyres_grid`. Pillow's bicubic on
    uint8 is the reference: a resize of tensors is close but not equal. Raises BadImage for shapes
    that would fill the memory."""
    image = image if image.mode == "RGB" else image.convert("RGB")      # a copy is 4 bytes a pixel
    if aspect == "square":
        tiles = [image]
    elif aspect == "pad":
        side = max(image.size)
        check_pixels(side, side)
        canvas = Image.new("RGB", (side, side), PAD)
        canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        tiles = [canvas]
    elif aspect == "squash":
        tiles = [image.resize((size, size), Image.Resampling.BICUBIC)]
    elif aspect == "anyres":
        grid = anyres_grid(*image.size, size, grids=grids)
        canvas = Image.new("RGB", grid.best)        # quirk: black here, the mean colour in `pad`
        canvas.paste(image.resize(grid.resized), tuple((b - r) // 2 for b, r in
                                                       zip(grid.best, grid.resized)))
        tiles = [image.resize((size, size))]        # quirk: squashed, not cropped or padded
        tiles += [canvas.crop((x, y, x + size, y + size)) for y in range(0, grid.best[1], size)
                  for x in range(0, grid.best[0], size)]
    else:
        raise UsageError(f"aspect {aspect!r} is unknown: choose square, pad, squash or anyres")
    return torch.from_numpy(np.stack([clip_normalize(tile, size) for tile in tiles]))


# ---------------------------------------------------------------- look

def colour_labels(ids, labels, words: Tokenizer, *pictures: str) -> str:
    """The tokens in a row, learned ones green on a terminal, in [brackets] elsewhere.

    pictures: what stands for each picture, in order; <image> where none is left."""
    on, off = ("\033[32m", "\033[0m") if sys.stdout.isatty() else ("[", "]")
    names = iter(pictures)
    texts = [next(names, IMAGE_TOKEN) if i == IMAGE else words._lib.id_to_token(i).replace("\n", "⏎")
             for i in ids]
    return " ".join(t if x == IGNORE else on + t + off
                    for t, x in zip(map(printable, texts), labels))


def show_example() -> int:
    """Print one conversation as the model meets it."""
    folder = Path(__file__).parent / "toy/weights/llama"
    talk = [{"from": who, "value": text} for who, text in [
        ("human", "<image>\nWhat is it?"), ("gpt", "A cat."), ("human", "Sure?"), ("gpt", "Yes.")]]
    if not (folder / "tokenizer.json").exists():
        print("No tokenizer in toy/weights/llama (python train.py --stage 0 makes it); as text:\n")
        for text, learned, _ in segments(*parse_turns(talk, "v1")[::-1], training=True):
            print("learned" if learned else "       ", repr(text))
        return 0
    words = Tokenizer(folder)
    ids, labels = encode(talk, "v1", words)
    print(colour_labels(ids, labels, words))
    print(f"\n{len(ids)} tokens, {sum(l != IGNORE for l in labels)} of them learned (marked).")
    return 0


if __name__ == "__main__":
    if sys.argv[1:]:                        # check, show: the dataset doctor
        runpy.run_module("trainer.doctor", run_name="__main__", alter_sys=True)
    else:
        sys.exit(show_example())
