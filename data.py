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
import argparse
import itertools
import json
import math
import mmap
import os
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

import numpy as np
import tokenizers
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from formats.checkpoints import Claim, refuse_folder, refuse_pickle, shard_set
from formats.conversations import (MARK, ROLES, at_an_edge, images_of, parse_row,
                                   read_conversations, read_rows)
from formats.errors import (BadData, BadImage, BadModel, Failure, NothingToLearn, Offline,
                            TrainingFailed, Usage, guarded)
from formats.pictures import FORMATS, check_pixels, list_pictures, load_image, picture_path
from formats.prefix import drop_apart, write_prefix
from formats.processors import MEAN, STD
from formats.strict_json import _json, file_text, json_values, parse_json, read_config, read_json
from formats.templates import (PROBES, ChatTemplate, find, recognise, special_tokens,
                                write_jinja)
from formats.tokenizers import add_tokens, refuse_sentencepiece, token_dict, tokenizer_config

IMAGE, IGNORE = -200, -100      # in no vocabulary: the picture's place, and "learn nothing"
ZEROS = "(zeros)"               # in a weight table: a piece that is in no file


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
        path = Path(folder) / "tokenizer.json"
        refuse_sentencepiece(path)
        config, spec = tokenizer_config(folder), _json(path, 64_000_000)
        try:
            prefix = self._take_prefix(spec)
            spec["truncation"] = spec["padding"] = None     # CLIP's file cuts at 77 by itself
            self._load(spec, path)
            self.more = add_tokens(self._lib, config)       # those that are not in tokenizer.json
            vocabulary = self._lib.get_vocab()
            if sorted(vocabulary.values()) != list(range(len(vocabulary))) or not vocabulary:
                raise ValueError("token ids must be 0, 1, 2 ... without gaps")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise BadModel(f"{path}: not a tokenizer ({error!r}): replace the file") from None
        added = {token.content: i for i, token in self._lib.get_added_tokens_decoder().items()}
        self.size, self.folder = len(vocabulary), Path(folder)
        # The slow tokeniser of the official code obeys the config, not the file.
        legacy = config.get("legacy")
        self.legacy = prefix == "every" if legacy is None else bool(legacy)
        self.prefix = prefix and ("every" if self.legacy else "first")
        self.stood = prefix                             # transformers obeys the file
        self._added = added
        self._look_for(added)
        config = {k: v.get("content") if isinstance(v, dict) else v for k, v in config.items()}

        def find(key, default):
            token = config.get(key) if isinstance(config.get(key), str) else default
            return vocabulary.get(token)

        self.bos, self.eos = find("bos_token", "<s>"), find("eos_token", "</s>")
        self.unk, pad = find("unk_token", "<unk>"), find("pad_token", None)
        self.pad = next(i for i in (pad, self.unk, self.eos, 0) if i is not None)
        length = config.get("model_max_length", 2048)
        self.max_length = length if isinstance(length, (int, float)) else 2048
        # quirk: LLaMA-3's config does not say it, its post-processor writes it
        opens = self._lib.encode("").ids[:1] == [self.bos]
        self.add_bos = self.bos is not None and bool(
            config.get("add_bos_token", bool(prefix) or opens))

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

    @staticmethod
    def _take_prefix(spec) -> str:
        """Remove the ▁ prefix from the pipeline; say where it stood: every | first | (nowhere)."""
        drop_apart(spec, MARK)
        found, normalizer = "", spec.get("normalizer")
        parts = normalizer.get("normalizers", []) if normalizer else []
        if any(part["type"] == "Prepend" for part in parts):
            parts[:] = [part for part in parts if part["type"] != "Prepend"]
            found = "every"
        splitter = spec.get("pre_tokenizer")
        if splitter and splitter["type"] == "Metaspace":
            scheme = splitter.get("prepend_scheme", "always")
            found = {"always": "every", "first": "first"}.get(scheme, "")
            splitter["prepend_scheme"] = "never"
            splitter.pop("add_prefix_space", None)
        return found

    def _load(self, spec, path):
        try:
            self._lib = tokenizers.Tokenizer.from_str(json.dumps(spec))
            self._lib.encode_special_tokens = True      # specials are found here, not in there
            self._lib.encode("a ▁ é 😀\n", add_special_tokens=False)
        except BaseException as error:
            # The library raises bare Exception, which has no subclass to name; anything more
            # specific (Ctrl-C, a bug of ours) must still get through.
            if type(error) is not Exception:
                raise
            raise BadModel(f"{path}: not a tokenizer ({error}): replace the file") from None

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

    def pairs(self, text: str, special=True, prefix=None) -> list[tuple[int, int]]:
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
        return [self.bos] * (bos and self.add_bos) + [i for i, _ in self.pairs(text, special)]

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
    picture: str = MARK
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
# What stage 2 of MiniGPT-4 asks about its pictures.                     [MiniGPT4] 2304.10592
INSTRUCTIONS = ("Describe this image in detail.",
                "Take a look at this image and describe what you notice.",
                "Please provide a detailed description of the picture.",
                "Could you describe the contents of this image for me?")
TEMPLATES |= {"vicuna_v1": TEMPLATES["v1"], "v0": TEMPLATES["llava_v0"],
              "mistral_direct": TEMPLATES["chatml_direct"], "llava_llama_3": TEMPLATES["llama_3"]}


def _with_system(name: str, text: str) -> Template:
    """The template with another system text. Raises BadData where training has none."""
    t = TEMPLATES[name]
    if t.style not in ("two", "single", "chat", "llama2") or not t.system:
        raise BadData(f"template {name} has no system text, but the sample has one: take it out, "
                      "put it into the first question, or train with --template v1")
    return replace(t, system=t.header + text, given=text)       # in style chat the header stays


def _turns(conversation, name) -> tuple[Template, list]:
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


def _alternating(turns) -> list:
    turns = turns[1:] if turns and turns[0][0] else turns       # quirk: a leading answer is dropped
    for i, (answer, _) in enumerate(turns):
        if answer != bool(i % 2):
            raise BadData(f"turn {i + 1} has the wrong speaker: questions and answers must take "
                          "turns")
    return turns


def _pieces(turns, t: Template, training: bool):
    """Yield (text, learned?, written by a person?) whose texts join to the whole conversation."""
    own = t.system.removesuffix(t.given)        # what people gave cannot hold control tokens
    if not t.front:
        yield BOS, False, False
    if t.style == "plain":
        yield MARK, False, False                    # quirk: the human's words are thrown away
        if t.front:         # quirk: with nothing asked BOS is learned, from the last of the queries
            yield BOS, training, False
        if training:
            yield turns[1][1], True, True
            yield t.end, True, False                # a newline and no </s>   [LLaVA15] stage 1
        return
    if t.style == "instruct":
        # It knows one instruction and one answer: in a chat it is asked the last question only.
        asked = [value for answer, value in turns if not answer]
        yield MARK * (MARK in asked[0]), False, False
        yield BOS, False, False
        yield asked[-1].replace(MARK, "", len(asked) == 1).strip(), False, True
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
            if MARK in value and not answer:
                yield f"<Img>{MARK}</Img> ", False, False
                value = value.replace(MARK, "", 1).strip()
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


def _tokenise(pieces, tokenizer, pictures=-1, special=True) -> tuple[list, list]:
    """Pieces to (ids, learned flags). pictures: so many <image> are pictures, the rest text; -1:
    all are. special=False: what people wrote stays plain text."""
    text, learned, human, joints = "", bytearray(), bytearray(), []
    for piece, learn, person in pieces:
        if piece is BOS or piece is SEAM:
            joints.append((len(text), piece, learn))
        text += piece
        learned += bytes([learn]) * len(piece)
        human += bytes([person]) * len(piece)
    marks = [(found.start(), MARK, False) for found in re.finditer(MARK, text)]
    joints += marks if pictures < 0 else marks[:pictures]
    ids, flags, at = [], [], 0
    # quirk: the text between two pictures is tokenised as if it stood alone, prefix space included.
    for end, joint, learn in sorted(joints, key=lambda j: j[0]) + [(len(text), SEAM, False)]:
        for token, start in tokenizer.pairs(
                text[at:end], lambda m: special or not any(human[at + m.start():at + m.end()])):
            ids.append(token)
            flags.append(bool(learned[at + start]))
        at = end + len(joint)
        if joint is BOS and tokenizer.add_bos or joint is MARK:
            ids.append(IMAGE if joint is MARK else tokenizer.bos)
            flags.append(learn)
    return ids, flags


def prompt_ids(text: str, tokenizer, special: bool = True) -> list[int]:
    """Ids of a text in which <image> stands for a picture (official tokenizer_image_token)."""
    return _tokenise([(BOS, False, False), (text, False, True)], tokenizer, special=special)[0]


def _prompt_pieces(conversation, template):
    t, turns = _turns(conversation, template)
    turns = turns + [(True, "")] if turns and not turns[-1][0] else turns
    turns = turns if t.style == "plain" else _alternating(turns)
    if not turns or t.style == "llama2" and not turns[0][1]:
        raise BadData("a conversation must open with something a human says")
    if MARK in t.system:
        raise BadData(f"{MARK} in the system text: move it into a question")
    return list(_pieces(turns, t, training=False))


def prompt(conversation, template: str) -> str:
    """The generation prompt, ending where the model starts to write (llava/conversation.py).

    A last gpt turn may be absent or None. quirk: mmtag templates do not wrap <image> here."""
    if isinstance(template, ChatTemplate):
        return "".join(text for text, _ in _own_pieces(conversation, template))
    return "".join(text for text, _, _ in _prompt_pieces(conversation, template))


def chat_ids(conversation, template: str, tokenizer, pictures: int = -1) -> list[int]:
    """Ids of `prompt`, in which nothing that people typed can become a control token.

    pictures: so many <image> are pictures, those behind them were typed; -1: all are."""
    if isinstance(template, ChatTemplate):
        return _own_ids(_own_pieces(conversation, template, pictures), tokenizer)
    return _tokenise(_prompt_pieces(conversation, template), tokenizer, pictures, special=False)[0]


def question(conversation) -> str:
    """What a person says last, as it was typed: what an InstructBLIP's Q-Former reads."""
    asked = [turn["value"] for turn in conversation if ROLES[turn["from"]] == "human"]
    return (asked[-1] or "").replace(MARK, "").strip() if asked else ""
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
        found = text.split(MARK, pictures) if role == "user" and pictures else [text]
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
        return [i for i, _ in tokenizer.pairs(
            text, lambda m: not any(human[m.start():m.end()]), tokenizer.stood)]

    mark, ids, rest = tokenizer.added(MARK), [], []
    if mark is not None:
        ids = [IMAGE if i == mark else i for i in coded(pieces)]
    else:                                   # a tokenizer without the token: cut there ourselves
        for piece, person in pieces:
            first, *more = [piece] if person else piece.split(MARK)
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
        if source in (chat_template(name), chat_template(name, words)):
            return name
    special = {"bos_token": words.token(words.bos), "eos_token": words.token(words.eos)}
    special = {name: token for name, token in special.items() if token is not None}
    chat = ChatTemplate.of(source, found[1], special | special_tokens(folder))
    ours = {}
    for name, t in TEMPLATES.items():
        if t.style in ("two", "chat", "llama2", "single"):
            talks = [[{"from": role, "value": "".join(
                f"{MARK}\n" if part is None else part for part in parts)}
                for role, parts in turns] for turns in PROBES]
            ours[name] = _opening(t), [prompt(talk, name) for talk in talks]
    try:
        chat = recognise(chat, ours, special.get("bos_token", "") if words.add_bos else "")
        if isinstance(chat, ChatTemplate):
            chat.end = words.first_end(chat.after_an_answer(), chat.known)
    except (ValueError, TimeoutError):          # said when it is used: --template may be given
        pass
    return chat


def _opening(t: Template) -> str:
    """The system text with all that stands around it."""
    if t.style != "llama2":
        return t.system + t.sep
    return f"<<SYS>>\n{t.system}\n<</SYS>>\n\n" if t.system else ""


def _mismatch(text, t: Template, tokenizer, pictures, ids) -> bool:
    """Would the official code print "tokenization mismatch" and learn nothing from this text?

    It counts tokens round by round on a second tokenisation; special tokens in the text, empty
    answers or a tokeniser it does not know make the sum differ from the length."""
    if t.style not in ("two", "llama2"):
        return False
    count, begin = 1, (BOS, False, False)
    size = lambda s: len(_tokenise([begin, (s, False, False)], tokenizer, pictures)[0])
    split = "[/INST] " if t.style == "llama2" else f"{t.sep}{t.roles[1]}: "
    for i, part in enumerate(text.split(t.end)):
        if not part or len(part.split(split)) != 2:
            break
        count += size(part) - (i > 0 and t.style == "two" and not tokenizer.legacy)
    total = sum(i != tokenizer.pad for i in ids)
    return count < tokenizer.max_length and count != total


def _training_pieces(conversation, template, has_image) -> tuple[Template, list]:
    """The first half of `encode`: the template, and `_pieces` of a sample that it can hold."""
    t, turns = _turns(conversation, template)
    pictures = int(has_image)
    if t.style not in ("single", "plain"):
        turns = _alternating(turns)
    if pictures > 1 and t.style in ("plain", "minigpt4", "instruct"):
        raise BadData(f"template {template} holds one picture, not {pictures}: split the sample, "
                      "or train with --template v1")
    if t.style == "plain" and not (pictures and [answer for answer, _ in turns] == [False, True]
                                   and MARK in turns[0][1]):
        raise BadData(f"template {template} needs <image> in one human turn, and one gpt turn: a "
                      "caption")
    if t.style in ("instruct", "minigpt4") and (
            len(turns) != 2 or MARK in turns[0][1] and not pictures):
        raise BadData(f"template {template} is learned from one question and one answer, and "
                      "<image> in it needs a picture; split or correct the sample")
    if t.style == "llama2" and not (turns and turns[0][1]):
        raise BadData("the first human turn is empty: give the question")
    if pictures and MARK in t.system:
        raise BadData(f"{MARK} in the system text: move it into a question")
    if pictures == 1:   # the picture comes first in its turn, and twice in one turn is once
        turns = [(a, f"{MARK}\n{v.replace(MARK, '').strip()}".strip() if MARK in v else v)
                 for a, v in turns]
    if pictures:
        turns = [(a, v.replace(MARK, t.picture)) for a, v in turns]
    return t, list(_pieces(turns, t, training=True))


def encode(conversation, template: str, tokenizer, has_image: bool | int = True,
           official_quirks: bool = False) -> tuple[list[int], list[int]]:
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
    t, pieces = _training_pieces(conversation, template, has_image)
    return _labelled(t, pieces, tokenizer, int(has_image), official_quirks)


def _labelled(t, pieces, tokenizer, pictures, official_quirks) -> tuple[list[int], list[int]]:
    """The second half of `encode`: (ids, labels) of the pieces."""
    count = -1 if pictures else 0
    ids, flags = _tokenise(pieces, tokenizer, count)
    if t.style == "single" and not pictures:
        # quirk: text-only lengths leave out the pad token (= <unk>), so an <unk> typed in the text
        # shifts every later label by one to the left.
        kept = [flag for i, flag in zip(ids, flags) if i != tokenizer.pad]
        flags = kept + [True] * (len(ids) - len(kept))
    if official_quirks and _mismatch("".join(p[0] for p in pieces), t, tokenizer, count, ids):
        flags = [False] * len(ids)
    return ids, [i if flag else IGNORE for i, flag in zip(ids, flags)]


# ---------------------------------------------------------------- may a sample be trained on?

def _lesson(sample, template: str, asked: str = "") -> list:
    """The turns that a sample teaches under a template, its system text first.

    The recipes of BLIP-2 and MiniGPT-4 learn one question and one answer: web captions cleaned
    (of a file's samples, which have an id; the toy world's are learned as they are), and in
    `minigpt4` an instruction instead of the question. asked: that one; the longest if not given."""
    talk, system = sample["conversations"], sample.get("system")
    if template in ("blip2", "minigpt4_caption", "minigpt4") and len(talk) != 2:
        raise BadData(f"template {template} is learned from one question and one answer, not from "
                      f"{len(talk)} turns: split the sample")
    if template in ("blip2", "minigpt4_caption") and "id" in sample:
        talk = [talk[0], {**talk[1], "value": caption_text(talk[1]["value"])}]
    if template == "minigpt4":
        asked = asked or max(INSTRUCTIONS, key=len)
        talk = [{"from": "human", "value": f"{MARK}\n{asked.replace(MARK, '').strip()}"}, talk[1]]
    return [{"from": "system", "value": system}, *talk] if system else talk


def sample_pieces(sample, template: str, asked: str = "") -> tuple[Template, list, int]:
    """(template, `_pieces`, pictures) of a sample: the one judge of what can be trained on.

    Training and the doctor both ask here, so that one refuses what the other does, in the same
    words. Raises BadData, or NothingToLearn where all answers are blank."""
    talk, pictures = _lesson(sample, template, asked), len(images_of(sample))
    if not pictures:
        _refuse_stray_marks(talk)
    t, pieces = _training_pieces(talk, template, pictures)
    marks = sum(piece.count(MARK) for piece, _, _ in pieces)
    if pictures and marks != pictures:
        what = "one picture" if pictures == 1 else f"{pictures} pictures"
        raise BadData(f"{what}, but {marks} <image> places in the text: correct the row")
    if not any(learned and person and piece.strip() for piece, learned, person in pieces):
        raise NothingToLearn("nothing to learn, no answer has words: take the row out")
    return t, pieces, pictures


def _refuse_stray_marks(talk):
    """Raise BadData for <image> without a picture. In the middle of a sentence it may be meant as
    text, and is read as such."""
    for turn in talk:
        text = turn["value"] or ""
        if ROLES.get(turn["from"]) == "human" and any(
                at_an_edge(text, *found.span()) for found in re.finditer(MARK, text)):
            raise BadData("<image> in the text, but no picture: give the row an image")


def check_size(size: int, pack: int, about: str = ""):
    """Raise BadData for a sample of so many tokens that no row of --pack can hold."""
    if pack and size > pack:
        raise BadData(f"{about}{size:,} tokens are over --pack {pack:,}: a sample must fit into a "
                      f"row of --pack {pack:,} with its pictures; shorten or split it")


def encode_sample(sample, template: str, tokenizer, image_tokens: int, pack: int = 0,
                  max_length: int = 0, official_quirks: bool = False, asked: str = ""):
    """(ids, labels) of a sample {conversations, image?, system?}, if it can be trained on.

    image_tokens: places of a picture. max_length: tokens behind it are cut off, 0: none are. pack:
    most tokens of a sample, 0: any. asked: `minigpt4`'s instruction. Raises BadData, or
    NothingToLearn for a sample without a learned token."""
    t, pieces, pictures = sample_pieces(sample, template, asked)
    ids, labels = _labelled(t, pieces, tokenizer, pictures, official_quirks)
    labels = [IGNORE, *labels[1:]]              # no text stands before the first
    learned = any(label != IGNORE for label in labels)
    size = len(ids) + (image_tokens - 1) * ids.count(IMAGE)
    if max_length and size > max_length:
        room = max_length - (size - len(ids))   # quirk: what follows is lost, answers too
        if IMAGE in ids[max(room, 0):]:
            raise BadData(f"its picture ends behind --max-length {max_length:,}")
        ids, labels, size = ids[:room], labels[:room], max_length
    check_size(size, pack)
    if not learned:
        raise NothingToLearn("nothing to learn: the official code would print a tokenization "
                             "mismatch and leave it out; so does --official-quirks")
    if all(label == IGNORE for label in labels):
        raise NothingToLearn(f"nothing to learn: its answers stand behind --max-length "
                             f"{max_length:,}: give more, or shorten the question")
    return ids, labels


def caption_text(text: str, words: int = 50) -> str:
    """A web caption as BLIP-2 and MiniGPT-4 learn it in stage 1 (LAVIS, blip_caption): small
    letters, . ! " ( ) * # : ; ~ as spaces, at most so many words."""
    text = re.sub(r"\s{2,}", " ", re.sub(r'[.!"()*#:;~]', " ", text.lower()))
    return " ".join(text.rstrip("\n").strip(" ").split(" ")[:words])


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


def _by_length(lengths, batch, ranks, dice) -> list[int]:
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
        return _by_length(lengths, batch, ranks, dice)
    steps, rest, size = [], [], batch * ranks
    for kind in kinds:
        order = [kind[i] for i in _by_length([abs(lengths[i]) for i in kind], batch, ranks, dice)]
        cut = [order[i:i + size] for i in range(0, len(order), size)]
        steps += cut[:-1]
        rest += cut[-1]
    mixed = [steps[i] for i in torch.randperm(len(steps), generator=dice).tolist()]
    return [i for step in mixed for i in step] + sorted(rest)


# ---------------------------------------------------------------- conversations on disk



# ---------------------------------------------------------------- pictures

PAD = (122, 116, 104)               # quirk: 255 × MEAN cut to integers, not rounded


class Grid(NamedTuple):
    """How anyres cuts a picture; pairs are (width, height) except `unpadded`."""
    best: tuple         # pixels of the canvas
    tiles: tuple        # tiles across and down
    resized: tuple      # pixels of the picture in the middle of the canvas
    unpadded: tuple     # (rows, columns) of patch features left after the padding is cut
    tokens: int         # features in all: overview, rows × columns, one newline vector a row


OFFICIAL = (1, 2), (2, 1), (2, 2), (3, 1), (1, 3)       # tiles across and down, in 1.6's order
TRANSPOSED = tuple((b, a) for a, b in OFFICIAL)         # the same list as transformers reads it


def anyres_grid(width: int, height: int, size: int = 336, patches: int = 24,
                grids: tuple = OFFICIAL) -> Grid:
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
    return Grid(best, (W // size, H // size), resized, (rows, columns),
                patches ** 2 + rows * (columns + 1))


def _clip(image, size) -> np.ndarray:
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
               grids: tuple = OFFICIAL) -> Tensor:
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
        raise Usage(f"aspect {aspect!r} is unknown: choose square, pad, squash or anyres")
    return torch.from_numpy(np.stack([_clip(tile, size) for tile in tiles]))


# ---------------------------------------------------------------- weights

def resolve(folder_or_hub_id) -> Path:
    """The local folder of a model; a hub id (owner/name) is downloaded, or found in the cache.

    Raises BadModel for a path that is no folder, Offline if the download is not possible."""
    path, name = Path(folder_or_hub_id), str(folder_or_hub_id)
    if path.is_dir():
        return path
    if path.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise BadModel(f"{name}: not a model folder: give a folder, or a hub id like owner/name")
    import huggingface_hub                              # slow to import, and rarely needed
    try:
        return Path(huggingface_hub.snapshot_download(
            name, allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
    except (OSError, ValueError) as error:
        why = str(error).strip().split("\n")[0]
        raise Offline(f"{name}: no such folder, and not to be had from the hub ({why}): "
                      f"check the name and the network, or give a local folder") from None


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
          "U8": torch.uint8, "BOOL": torch.bool}        # as safetensors spells them


class Weights(Mapping):
    """Name → tensor of safetensors files, in sorted order, read from disk only when asked for.

    The library checks the file; the tensors are views of a memory map of ours, so that `release`
    can hand pages back: else a loaded model and its file would stand in memory side by side."""

    def __init__(self, paths, listed=None):
        """listed: {name: file} of an index. A tensor of two files is the last file's, as in
        transformers; if the index names another, they must agree."""
        self._where, clashes = {}, []                   # name → (map, path, shape, dtype, offset)
        self.listed = listed or {}
        for path in paths:
            start, entries = self._header(path)
            try:
                with safe_open(path, framework="pt"), open(path, "rb") as file:
                    # private: whoever writes into a tensor changes it for himself, not the file
                    pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            except (SafetensorError, OSError, ValueError) as error:
                raise BadModel(f"{path}: damaged ({error}): download it again") from None
            for name, (shape, dtype, offset) in entries.items():
                file = Path(path).name
                if name in self._where and self.listed.get(name, file) != file:
                    clashes.append((name, self._where[name]))
                if dtype not in DTYPES:
                    raise BadModel(f"{path}: tensor {name} has dtype {dtype}, which is not read "
                                   "here: take the checkpoint in float32, float16 or bfloat16")
                self._where[name] = pages, path, shape, DTYPES[dtype], start + offset
        self._where = dict(sorted(self._where.items()))
        for name, (_, path, *_) in clashes:
            older = Weights([path])[name]
            if older.shape != self[name].shape or not bool((older == self[name]).all()):
                last = Path(self._where[name][1]).name
                raise BadModel(f"{path}: tensor {name} is in {last} too, with other values, and "
                               f"the index names the first: make it name {last}, if that is to be "
                               "loaded, or take the tensor out of that file")

    @staticmethod
    def _header(path) -> tuple:
        """(where the data begins, {name: (shape, dtype, offset)}).

        The library accepts a name twice, and tensors without elements."""
        def once(pairs):
            table = dict(pairs)
            if len(table) != len(pairs):
                raise ValueError(f"a name twice among {sorted(k for k, _ in pairs)[:3]}")
            return table
        try:
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if not 2 <= length <= 100_000_000:
                    raise ValueError(f"a header of {length} bytes")
                table = parse_json(file.read(length), object_pairs_hook=once)
            table.pop("__metadata__", None)
            entries = {name: (tuple(entry["shape"]), entry["dtype"], entry["data_offsets"][0])
                       for name, entry in table.items()}
            for name, (shape, _, _) in entries.items():
                if not all(type(n) is int and n > 0 for n in shape):
                    raise ValueError(f"tensor {name} of shape {shape}")
        except (AttributeError, LookupError, OSError, RecursionError, TypeError,
                ValueError) as error:
            raise BadModel(f"{path}: damaged ({error!r}): download it again") from None
        return 8 + length, entries

    def __getitem__(self, name) -> Tensor:
        pages, path, shape, dtype, offset = self._where[name]
        flat = torch.frombuffer(pages, dtype=dtype, count=math.prod(shape), offset=offset)
        if dtype.is_floating_point:
            low, high = flat.aminmax()              # NaN comes through; no copy of the tensor
            if not math.isfinite(low) or not math.isfinite(high):
                raise BadModel(f"{path}: tensor {name} holds NaN or infinity: use another "
                               "checkpoint")
        return flat.view(shape)

    def release(self, name):
        """Drop a tensor's pages from memory; they are read again if the tensor is used again.
        What was written into them is lost. A system that cannot drop pages keeps them."""
        pages, _, shape, dtype, offset = self._where[name]
        first = offset - offset % mmap.PAGESIZE
        if hasattr(mmap, "MADV_DONTNEED"):
            pages.madvise(mmap.MADV_DONTNEED, first,
                          offset - first + math.prod(shape) * dtype.itemsize)

    @property
    def dtype(self):
        """That of most of the numbers, if they are floating point; else BadModel."""
        total = Counter()
        for _, _, shape, dtype, _ in self._where.values():
            total[dtype] += math.prod(shape)
        dtype = total.most_common(1)[0][0] if total else torch.float32
        if not dtype.is_floating_point:
            raise BadModel(f"{next(iter(self._where.values()))[1]}: holds {dtype} weights: take a "
                           "checkpoint that is not quantised")
        return dtype

    def __contains__(self, name):
        return name in self._where                  # Mapping's own would read the tensor

    def __iter__(self):
        return iter(self._where)

    def __len__(self):
        return len(self._where)

    def shape(self, name) -> tuple:
        """Shape of a tensor, without reading it."""
        return self._where[name][2]


def dtype_name(dtype) -> str:
    """As config.json spells it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def load_weights(folder_or_hub_id) -> Weights:
    """All tensors of a model folder: model.safetensors, or its shards by their index; or of a file.

    Memory-mapped: nothing is read before it is asked for. Raises BadModel for a folder without
    safetensors, damaged files, repeated or empty tensors, and, when read, NaN or infinity."""
    if str(folder_or_hub_id).endswith(".safetensors") and Path(folder_or_hub_id).is_file():
        return Weights([Path(folder_or_hub_id)])
    refuse_pickle(folder_or_hub_id)
    folder = resolve(folder_or_hub_id)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return Weights([single])
    if not index.exists():
        files = sorted(folder.glob("*.safetensors"))
        if (len(files) == 1 or shard_set(files)) and not (folder / "adapter_config.json").exists():
            return Weights(files)
        refuse_folder(folder)
    table = _json(index, 64_000_000)
    table = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(table, dict) or not table or not all(
            type(f) is str and PureWindowsPath(f).name == f and f.endswith(".safetensors")
            for f in table.values()):
        raise BadModel(f"{index}: weight_map must name files beside it: download it again")
    # as transformers: all that is in these files, listed or not
    return Weights([folder / file for file in sorted(set(table.values()))], table)


def save_weights(folder, tensors: Mapping, max_bytes: int = 5_000_000_000):
    """Write model.safetensors, or shards of at most max_bytes with their index.

    Each file is written aside and renamed. Tensors that share memory are stored once each.
    Raises TrainingFailed if the disk does not take them."""
    folder, shards, used, seen = Path(folder), [{}], 0, set()
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensor in sorted(tensors.items()):
        if used and used + tensor.nbytes > max_bytes:
            shards.append({})
            used = 0
        tensor = tensor.detach().contiguous()
        pointer = tensor.untyped_storage().data_ptr()
        shards[-1][name] = tensor.clone() if pointer in seen else tensor
        seen.add(pointer)
        used += tensor.nbytes
    n = len(shards)
    files = [f"model-{i:05}-of-{n:05}.safetensors" if n > 1 else "model.safetensors"
             for i in range(1, n + 1)]
    try:
        for file, shard in zip(files, shards):
            save_file(shard, folder / f"{file}.tmp", {"format": "pt"})
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(folder / f"{file}.tmp", 0o666 & ~mask)     # the library makes it 0600
            os.replace(folder / f"{file}.tmp", folder / file)
    except SafetensorError as error:
        raise TrainingFailed(f"{folder}: cannot write weights ({error}): free some space") from None
    finally:
        for left in folder.glob("model*.safetensors.tmp"):
            left.unlink()
    index = folder / "model.safetensors.index.json"
    if n > 1:
        table = {name: file for file, shard in zip(files, shards) for name in shard}
        size = sum(tensor.nbytes for tensor in tensors.values())
        table = {"metadata": {"total_size": size}, "weight_map": table}
        index.write_text(json.dumps(table, indent=1))
    else:
        index.unlink(missing_ok=True)
    for stale in set(folder.glob("model*.safetensors")) - {folder / file for file in files}:
        stale.unlink()


def expand(module, names) -> dict:
    """{our parameter: (their names)} with every {} replaced by its layer number."""
    table = {}
    for ours, _ in module.named_parameters():
        layers = re.findall(r"(?<=\.)\d+(?=\.)", ours)
        theirs = names.get(ours) or names.get(re.sub(r"(?<=\.)\d+(?=\.)", "{}", ours))
        if theirs is None:
            raise BadModel(f"parameter {ours} has no name in the table of {type(module).__name__}")
        theirs = (theirs,) if isinstance(theirs, str) else theirs
        table[ours] = tuple(name.format(*layers) for name in theirs)
    return table


def _materialise(module, dtype):
    """Give memory to parameters on the meta device; tied ones stay tied, unlike in to_empty()."""
    fresh = {}
    for part in module.modules():
        for name, p in list(part._parameters.items()):
            if p is not None and p.is_meta:
                if id(p) not in fresh:
                    empty = torch.empty_like(p, device="cpu", dtype=dtype)
                    fresh[id(p)] = torch.nn.Parameter(empty, p.requires_grad)
                part._parameters[name] = fresh[id(p)]


def fill(module, names: Mapping, weights: Mapping, ignore: Mapping | None = None, dtype=None):
    """Copy `weights` into the parameters of `module` in place; returns it.

    names: {ours: theirs}; {} stands for a layer number; a tuple of theirs is concatenated on dim 0
    (fused q, k, v), ZEROS in it is as large as the first. ignore: {regex of theirs: reason}, of
    which a formats.checkpoints.Claim is checked. A module built on the meta device is given memory
    on the CPU, in dtype or the file's own; another keeps its own dtype.
    Nothing is copied unless all fits: BadModel names the tensor that is
    missing, left over, or of the wrong shape, with both shapes."""
    table, used = expand(module, names), set()
    ours = dict(module.named_parameters())
    for name, theirs in table.items():
        if lost := [t for t in theirs if t not in weights and t != ZEROS]:
            file = getattr(weights, "listed", {}).get(lost[0])
            raise BadModel(f"tensor {lost[0]} is missing (needed for {name}): " + (
                f"the index names {file}, which does not hold it: download that file again" if file
                else "wrong kind of model?"))
        shapes = [tuple(weights.shape(t) if hasattr(weights, "shape") else weights[t].shape)
                  for t in (theirs[0] if t == ZEROS else t for t in theirs)]
        want = tuple(ours[name].shape)
        got = (sum(s[0] for s in shapes if s), *shapes[0][1:]) if len(shapes) > 1 else shapes[0]
        if got != want or any(s[1:] != want[1:] for s in shapes):
            raise BadModel(f"tensor {', '.join(theirs)}: shape {' + '.join(map(str, shapes))}, but "
                           f"{name} needs {want}: config.json and weights disagree")
        used.update(theirs)
    rest = []
    for name in (t for t in weights if t not in used):
        reason = next((r for pattern, r in (ignore or {}).items() if re.fullmatch(pattern, name)),
                      None)
        if isinstance(reason, Claim):
            reason.check(name, weights)
        elif reason is None:
            rest.append(name)
    if rest:
        raise BadModel(f"tensor {rest[0]} (and {len(rest) - 1} more) has no place in "
                       f"{type(module).__name__}: wrong kind of model?")
    _materialise(module, dtype or getattr(weights, "dtype", None))
    ours, release = dict(module.named_parameters()), getattr(weights, "release", lambda name: None)
    with torch.no_grad():
        for name, theirs in table.items():
            row = 0
            for their in theirs:
                zeros = their == ZEROS
                tensor = torch.zeros_like(weights[theirs[0]]) if zeros else weights[their]
                target = ours[name] if len(theirs) == 1 else ours[name][row:row + len(tensor)]
                target.copy_(tensor)
                row += len(tensor) if len(theirs) > 1 else 0
                if not zeros:
                    release(their)
    return module


def export(module, names: Mapping) -> dict[str, Tensor]:
    """The reverse of `fill`: {theirs: tensor}, views where ours is fused.

    A fused tensor is split by `module.split_sizes(our_name)` (rows of each piece) if the module has
    that method, else into equal pieces."""
    ours, out = dict(module.named_parameters()), {}
    for name, theirs in expand(module, names).items():
        tensor = ours[name].detach()
        if len(theirs) == 1:
            out[theirs[0]] = tensor
            continue
        equal = lambda _: [len(tensor) // len(theirs)] * len(theirs)
        sizes = getattr(module, "split_sizes", equal)(name)
        out.update(zip(theirs, tensor.split(sizes), strict=True))
    out.pop(ZEROS, None)
    return out


def save_tokenizer(words: Tokenizer, folder, extra=(), apart=False):
    """Copy tokenizer.json and its config; `extra` tokens get the next free ids.

    apart: others shall tokenise what follows <image> as `encode` does."""
    folder = Path(folder)
    spec = _json(words.folder / "tokenizer.json", 64_000_000)
    config = tokenizer_config(words.folder)
    config.pop("added_tokens_decoder", None)        # all are in tokenizer.json, with their ids
    spec["added_tokens"] = spec.get("added_tokens") or []
    for token in spec["added_tokens"]:
        token["id"] = words.added(token["content"], token["id"])
    spec["added_tokens"] += [{"id": words.added(token.content), **token_dict(token)}
                             for token in words.more]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    new = [token for token in extra if words.added(token) is None]
    for i, token in enumerate(new):
        spec["added_tokens"].append({"id": len(words) + i, "content": token, **flags,
                                     "special": True})
    if "<pad>" in extra:
        config["pad_token"] = "<pad>"
    if apart:
        config.pop("chat_template", None)           # a language model's: ours is in its own file
        write_prefix(spec, words.stood, words.prefix, MARK)
    (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


def chat_template(template: str, words: Tokenizer | None = None) -> str | None:
    """A template in Jinja, as transformers' processor renders it: the same text as `prompt`, from
    texts and from lists of parts. In a text <image> is a picture; a first turn from "system"
    replaces the template's system text.

    words: as a tokenizer alone renders it, which adds no BOS: the text begins with it.
    None where it is not written here: transformers then asks for one, and does not ask wrongly."""
    t = TEMPLATES[template]
    if t.style not in ("two", "chat", "llama2", "single", "plain"):
        return None
    if words is None or not words.add_bos:
        return write_jinja(t)
    begins = t.style != "plain" and words.begins_special("[INST]" if t.style == "llama2" else
                                                         _opening(t))
    return write_jinja(t, bos=True, space=words.prefix == "first" and not begins)


# ---------------------------------------------------------------- the doctor

class _Lengths(dict):
    """word → how many tokens it is; `of` adds up a sample, as long as `_tokenise` makes it.

    A word looked up once is ten times faster than the library, to which LLaMA's texts are one long
    word. Exact where no token has a ▁, which is a space, behind another letter: then no pair of
    bytes is merged across two words. Other vocabularies are tokenised in full."""

    def __init__(self, words):
        self.words, spec = words, json.loads(words._lib.to_str())
        model, cut = spec["model"], spec["pre_tokenizer"] or {"type": "Metaspace"}
        self.apart = (model["type"] == "BPE" and not model["dropout"] and "▁" in model["vocab"]
                      and not any("▁" in token.lstrip("▁") for token in model["vocab"])
                      and cut["type"] == "Metaspace" and set(re.findall(
                          r'"type": "(\w+)"', json.dumps(spec["normalizer"]))) <= {
                              "Sequence", "Replace"})

    def __missing__(self, word):
        if len(self) > 500_000:
            self.clear()
        self[word] = n = len(self.words._lib.encode(word, add_special_tokens=False).ids)
        return n

    def of(self, pieces, pictures: int) -> int:
        words, n, texts = self.words, 0, [""]
        if not self.apart or any("▁" in piece for piece, _, _ in pieces):
            return len(_tokenise(pieces, words, pictures)[0])
        for piece, _, _ in pieces:
            if piece is BOS or piece is SEAM:
                n += piece is BOS and words.add_bos
                texts.append("")
            else:
                texts[-1] += piece
        if pictures:
            n += sum(text.count(MARK) for text in texts)
            texts = [part for text in texts for part in text.split(MARK)]
        for text in texts:
            for i, part in enumerate(words._special.split(text)):
                pad = words.prefix == "every" or words.prefix == "first" and i == 0
                n += i > 0              # the special token before it
                n += sum(map(self.__getitem__, re.findall(" *[^ ]+| +", " " * pad + part))
                         ) if part else 0
        return n


def _size(sample, args, lengths) -> int:
    """Tokens of a sample, its pictures included; without a tokeniser, 4 for 3 words.

    Raises BadData for what training would refuse or leave out."""
    _, pieces, pictures = sample_pieces(sample, args.template)
    text = "".join(piece for piece, _, _ in pieces)
    words = (lengths.of(pieces, -1 if pictures else 0) if lengths is not None
             else len(text.split()) * 4 // 3)
    size, most = words + (args.places - 1) * pictures, args.max_length
    if most and size > most:
        if lengths is not None:                 # what the cut leaves is for the tokeniser to say
            ids, _ = encode_sample(sample, args.template, lengths.words, args.places, args.pack,
                                   most)
            return len(ids) + (args.places - 1) * pictures
        size = most
    check_size(size, args.pack, "" if lengths is not None else
               "about (4 for 3 words; --llm counts them) ")
    return size


def _opened(path, template):
    """What is wrong with a picture for the stages that have this template, or None."""
    try:
        short, long = sorted(load_image(path).size)
        if template == "plain":
            check_pixels(336, 336 * long // short)      # cropped to a square, its short side first
        elif not template.startswith(("blip2", "instructblip", "minigpt4")):
            check_pixels(long, long)                    # padded to a square; those are squashed
    except BadImage as error:
        return str(error).removeprefix(f"{path}: ")


def _ticking(things, what):
    """The things; every ten seconds a line on stderr tells how many there were."""
    start = told = time.monotonic()
    for n, thing in enumerate(things, 1):
        yield thing
        if (now := time.monotonic()) - told > 10:
            print(f"{n:,} {what}, {n / (now - start):,.0f} a second", file=sys.stderr)
            told = now


def _printable(text: str) -> str:
    """Text on one line; what could command a terminal is spelled out."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in " ".join(text.split()))


def check(args) -> int:
    """The dataset doctor: a line for each fault, then what the file holds. 0: clean, 3: faults."""
    if args.images and not os.path.isdir(args.images):
        raise Usage(f"--images {args.images}: no such folder: give the one that names start from")
    lengths = _Lengths(Tokenizer(resolve(args.llm))) if args.llm else None
    kinds, sizes, pictures, rows, samples = Counter(), [], {}, 0, 0
    find = partial(picture_path, follow_links=True) if args.follow_links else picture_path
    warnings.simplefilter("ignore")                 # Pillow's; its errors are what counts

    def fault(where, field, why):
        print(_printable(f"{where}: {field}{why}"))
        field = re.sub(r"\[\d+\]", "[]", re.sub(r" (['\"]).*\1", "", field))
        why = re.sub(r" \(.*|'.*?'", "", str(why)).split(": ")[0]
        kinds[_printable(field + re.sub(r"(?<![\w/.-])\d[\d,.×]*", "n", why))] += 1

    start = time.monotonic()
    for rows, where, got in _ticking(read_rows(args.file), "rows"):
        if isinstance(got, BadData):
            field, colon, why = str(got).partition(": ")
            fault(where, field + colon, why)
            continue
        for sample in got:
            samples += 1
            try:
                sizes.append(_size(sample, args, lengths))
            except BadData as error:
                fault(where, f"{sample['field']}: ", error)
        for name in images_of(got[0]):
            if not args.images:
                raise Usage(f"{where} has a picture: give --images, the folder of the pictures")
            try:
                pictures.setdefault(find(args.images, name), (where, name))
            except BadData as error:
                fault(where, f"image {name!r}: ", str(error).removeprefix(f"image {name!r}: "))
    read, start = time.monotonic() - start, time.monotonic()
    if not rows:
        raise BadData(f"{args.file}: holds no samples: expected a list of conversations")

    paths = list(pictures) if args.open else []
    with ThreadPoolExecutor(os.cpu_count()) as pool:        # a queue of all would fill the memory
        look = partial(_opened, template=args.template)
        looked = (pool.map(look, paths[i:i + 256]) for i in range(0, len(paths), 256))
        for path, why in zip(paths, _ticking(itertools.chain.from_iterable(looked), "pictures")):
            if why:
                fault(pictures[path][0], f"image {pictures[path][1]!r}: ", why)
    opened = time.monotonic() - start

    print(f"\n{args.file}: {rows:,} rows, {samples:,} samples, {len(pictures):,} pictures; "
          f"{kinds.total():,} faults")
    for kind, n in kinds.most_common():
        print(f"{n:9,}  {kind}")
    how = f"of {args.llm}" if args.llm else "estimated, 4 for 3 words: --llm counts them"
    print(f"tokens ({how}; template {args.template}; {args.places} for a picture):")
    bins = Counter(size.bit_length() for size in sizes)
    for bits in range(min(bins, default=0), max(bins, default=-1) + 1):
        bar = "█" * math.ceil(40 * bins[bits] / max(bins.values()))
        print(f"{1 << bits >> 1:7,} to {(1 << bits) - 1:7,} {bins[bits]:9,}  {bar}")
    if longer := sum(size > 2048 for size in sizes):
        print(f"{longer:,} are over 2,048, where the official runs cut: train.py --max-length 2048")
    print(f"without opening pictures: {read:.1f} s, {rows / read:,.0f} rows a second")
    if paths:
        print(f"opening {len(paths):,} pictures: {opened:.1f} s more, {len(paths) / opened:,.0f} "
              f"pictures a second; {rows / (read + opened):,.0f} rows a second in all")
    return 3 if kinds else 0


# ---------------------------------------------------------------- look

def marked(ids, labels, words: Tokenizer, *pictures: str) -> str:
    """The tokens in a row, learned ones green on a terminal, in [brackets] elsewhere.

    pictures: what stands for each picture, in order; <image> where none is left."""
    on, off = ("\033[32m", "\033[0m") if sys.stdout.isatty() else ("[", "]")
    names = iter(pictures)
    texts = [next(names, MARK) if i == IMAGE else words._lib.id_to_token(i).replace("\n", "⏎")
             for i in ids]
    return " ".join(t if x == IGNORE else on + t + off
                    for t, x in zip(map(_printable, texts), labels))


def show(args) -> int:
    """Print one row of a file as the model meets it."""
    words, row = Tokenizer(resolve(args.llm or Path(__file__).parent / "weights/toy/llama")), 0
    for row, where, got in read_rows(args.file):
        if row < args.sample:
            continue
        if isinstance(got, BadData):
            raise BadData(f"{where}: {got}")
        for sample in got:
            ids, labels = encode(_lesson(sample, args.template), args.template, words,
                                 len(images_of(sample)))
            pictures = [f"<{name}: {args.places} places>" for name in images_of(sample)]
            print(_printable(f"{where}, id {sample['id']}, template {args.template}"))
            print(marked(ids, labels, words, *pictures))
            n = len(ids) + (args.places - 1) * ids.count(IMAGE)
            print(f"\n{n} tokens, {sum(x != IGNORE for x in labels)} of them learned (marked).")
        return 0
    raise Usage(f"--sample {args.sample}: {args.file} has {row:,} rows")


def _show() -> int:
    """Print one conversation as the model meets it."""
    folder = Path(__file__).parent / "weights/toy/llama"
    talk = [{"from": who, "value": text} for who, text in [
        ("human", "<image>\nWhat is it?"), ("gpt", "A cat."), ("human", "Sure?"), ("gpt", "Yes.")]]
    if not (folder / "tokenizer.json").exists():
        print("No tokenizer in weights/toy/llama (python train.py --stage 0 makes it); as text:\n")
        for text, learned, _ in _pieces(*_turns(talk, "v1")[::-1], training=True):
            print("learned" if learned else "       ", repr(text))
        return 0
    words = Tokenizer(folder)
    ids, labels = encode(talk, "v1", words)
    print(marked(ids, labels, words))
    print(f"\n{len(ids)} tokens, {sum(l != IGNORE for l in labels)} of them learned (marked).")
    return 0


def arguments(argv=None):
    p = argparse.ArgumentParser(description="Look at training data.", allow_abbrev=False)
    sub = p.add_subparsers(dest="what", help="nothing: one conversation, as the model meets it")
    for name, told in (("check", "the dataset doctor: exit status 0 clean, 3 faults"),
                       ("show", "one row: its tokens, the learned ones marked")):
        q = sub.add_parser(name, help=told, allow_abbrev=False)
        q.add_argument("file", help="JSON or JSON lines of LLaVA, LLaMA-Factory, "
                       "OpenAI, ShareGPT4V, MiniGPT-4 or LAVIS")
        q.add_argument("--llm", help="folder or hub id of the LLaMA whose tokens are counted")
        q.add_argument("--template", choices=sorted(TEMPLATES), default="v1", metavar="NAME",
                       help="how the words are laid out (default: v1): " + ", ".join(TEMPLATES))
        q.add_argument("--places", type=int, default=576, metavar="N", help="tokens of a picture "
                       "(default: LLaVA's 576; with a Q-Former 32)")
        q.add_argument("--debug", action="store_true", help="tracebacks")
        if name == "show":
            q.add_argument("--sample", type=int, default=1, metavar="N", help="row, from 1")
            continue
        q.add_argument("--images", metavar="DIR", help="folder that the pictures' names start from")
        q.add_argument("--follow-links", action="store_true", help="links in that folder may lead "
                       "out of it")
        q.add_argument("--open", action=argparse.BooleanOptionalAction, default=True,
                       help="decode the pictures too, each once (default: yes)")
        q.add_argument("--pack", type=int, default=6144, metavar="N",
                       help="tokens of the longest sample that is no fault (default: 6144)")
        q.add_argument("--max-length", type=int, default=0, metavar="N", help="tokens behind which "
                       "training cuts a sample, as in train.py (default: 0, it is not cut)")
    a = p.parse_args(argv)
    for flag in ("places", "sample", "pack"):
        if getattr(a, flag, 1) < 1:
            p.error(f"--{flag}: a number from 1")
    if getattr(a, "max_length", 0) < 0:
        p.error("--max-length: a number from 1, or 0 to cut nothing")
    return a


def main(args) -> int:
    return {"check": check, "show": show}[args.what](args) if args.what else _show()


if __name__ == "__main__":
    ARGS = arguments()
    sys.exit(guarded(lambda: main(ARGS), getattr(ARGS, "debug", False)))
