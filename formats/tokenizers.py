"""tokenizer.json and what stands beside it: read, checked, and which tokens a folder adds.

    tokenizer.json           the library's pipeline; its prefix rule is taken out, `take_prefix`
    tokenizer_config.json    which tokens are BOS, EOS ..., and more added tokens
    TokenizerFile            all of it; data.Tokenizer adds how a text is encoded and decoded

Ids of added tokens are the library's, and so transformers': a token that tokenizer.json or
tokenizer_config.json puts beyond a gap gets the next free id, whatever number stands beside it.
Source: transformers 5.23, tokenization_utils_base.py (_from_pretrained) and
tokenization_utils_tokenizers.py (__init__); tests compare with AutoTokenizer."""
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import tokenizers
from tokenizers import AddedToken

from formats.conversations import IMAGE_TOKEN
from formats.errors import BadData, BadModel
from formats.hub import hub_id
from formats.prefix import drop_apart
from formats.strict_json import read_config, read_model_json
from formats.templates import texts_of

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token",
         "mask_token")
FLAGS = "single_word", "lstrip", "rstrip", "normalized", "special"


def tokenizer_config(folder) -> dict:
    """tokenizer_config.json; of older folders special_tokens_map.json wins, and added_tokens.json
    is written out as added_tokens_decoder."""
    config = read_config(folder, "tokenizer_config.json", missing_ok=True)
    if "added_tokens_decoder" in config:
        return config
    config |= read_config(folder, "special_tokens_map.json", missing_ok=True)
    named = [_content(config.get(key)) for key in NAMED]    # a list: a file may say anything
    older = read_config(folder, "added_tokens.json", missing_ok=True)
    config["added_tokens_decoder"] = {
        str(i): {"content": token, "special": token in named, "normalized": token not in named}
        for token, i in older.items()}
    return config


def _content(token):
    return token.get("content") if type(token) is dict else token


def more_tokens(config) -> list:
    """[AddedToken] that config names, in the order in which they get ids. Some of them may be in
    tokenizer.json already. Raises KeyError, TypeError or ValueError for what is no token."""
    named, tokens = [config.get(key) for key in NAMED], []
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    named += extra.values() if type(extra) is dict else extra
    special = {_content(token) for token in named if token}
    decoder = config.get("added_tokens_decoder") or {}
    for _, token in sorted((int(i), token) for i, token in decoder.items()):
        tokens.append(_token(token, token["content"] in special))
    have = {token.content for token in tokens}
    for token in named:
        if token and _content(token) not in have:
            tokens.append(_token(token, True))
    return tokens


def _token(token, special):
    """An AddedToken of a text or of a dict as config files have it."""
    if type(token) is str:
        token = {"content": token, "normalized": not special}
    flags = {key: token[key] for key in FLAGS if key in token}
    if type(token["content"]) is not str or any(type(x) is not bool for x in flags.values()):
        raise ValueError(f"not a token: {token}")
    flags["special"] = special or flags.get("special", False)
    return AddedToken(token["content"], **flags)


def add_tokens(lib, config) -> list:
    """Give the library's tokenizer the tokens that only config names; returns those [AddedToken].
    Known ones stay as they are."""
    known = {token.content for token in lib.get_added_tokens_decoder().values()}
    more = []
    for token in more_tokens(config):
        if token.content and token.content not in known:
            known.add(token.content)
            more.append(token)
    lib.add_tokens(more)
    return more


def token_dict(token) -> dict:
    """An AddedToken as tokenizer.json writes it."""
    return {"content": token.content, **{key: getattr(token, key) for key in FLAGS}}


def refuse_sentencepiece(path):
    """One line for a folder that has only older files, which are not read here."""
    folder = Path(path).parent
    hub = hub_id(folder)                            # of which tokenizer.model was not fetched
    older, elsewhere = "tokenizer.model", ("; Vicuna's words are also in the tokenizer.json of "
                                           "llava-hf/llava-1.5-7b-hf")
    if (folder / "merges.txt").exists():            # OPT's
        older, elsewhere = "vocab.json and merges.txt", ""
    if not path.exists() and (hub or any((folder / name).exists()
                                         for name in ("tokenizer.model", "merges.txt"))):
        raise BadModel(
            f"{hub or folder}: only {older}, and tokenizer.json is read here: convert it "
            "once, where transformers and sentencepiece are installed: python -c \"from "
            f"transformers import AutoTokenizer as T; T.from_pretrained('{hub or folder}')."
            f"save_pretrained('{folder}')\"{elsewhere}")


# ---------------------------------------------------------------- a folder's files

class TokenizerParts(NamedTuple):
    """What a folder's files say."""
    lib: tokenizers.Tokenizer       # without the prefix rule, which data.Tokenizer applies
    size: int                       # of the vocabulary, added tokens too
    prefix: str                     # every | first | "": before which texts a space goes
    prefix_in_file: str             # the same as tokenizer.json says it, which transformers obeys
    legacy: bool                    # LLaMA's older prefix rule
    bos: int | None
    eos: int | None
    unk: int | None
    pad: int
    add_bos: bool                   # a text begins with BOS
    max_length: int | float
    added: dict                     # {added token: id}
    added_by_config: list           # AddedTokens that are not in tokenizer.json


def read_tokenizer(folder) -> TokenizerParts:
    """tokenizer.json and what stands beside it. Raises BadModel for a file that is missing,
    damaged, or has ids with gaps."""
    path = Path(folder) / "tokenizer.json"
    refuse_sentencepiece(path)
    config, spec = tokenizer_config(folder), read_model_json(path, 64_000_000)
    try:
        in_file = take_prefix(spec)
        spec["truncation"] = spec["padding"] = None     # CLIP's file cuts at 77 by itself
        lib = load_library(spec, path)
        added_by_config = add_tokens(lib, config)
        vocabulary = lib.get_vocab()
        if sorted(vocabulary.values()) != list(range(len(vocabulary))) or not vocabulary:
            raise ValueError("token ids must be 0, 1, 2 ... without gaps")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadModel(f"{path}: not a tokenizer ({error!r}): replace the file") from None
    names = {key: _content(value) for key, value in config.items()}

    def find(key, default):
        token = names.get(key) if isinstance(names.get(key), str) else default
        return vocabulary.get(token)

    bos, eos, unk = find("bos_token", "<s>"), find("eos_token", "</s>"), find("unk_token", "<unk>")
    # The slow tokenizer of the official code obeys the config, not the file.
    legacy = config.get("legacy")
    legacy = in_file == "every" if legacy is None else bool(legacy)
    prefix = ""
    if in_file:
        prefix = "every" if legacy else "first"
    # quirk: LLaMA-3's config does not say that a text begins with BOS, its post-processor adds it
    opens = lib.encode("").ids[:1] == [bos]
    add_bos = bos is not None and bool(names.get("add_bos_token", bool(in_file) or opens))
    length = names.get("model_max_length", 2048)
    return TokenizerParts(
        lib, len(vocabulary), prefix, in_file, legacy, bos, eos, unk,
        first_id(find("pad_token", None), unk, eos), add_bos,
        length if isinstance(length, (int, float)) else 2048,
        {token.content: i for i, token in lib.get_added_tokens_decoder().items()}, added_by_config)


def first_id(*ids, below=math.inf) -> int:
    """The first of these ids that exists and is below a number; else 0."""
    for i in ids:
        if i is not None and i < below:
            return i
    return 0


def take_prefix(spec) -> str:
    """Remove the ▁ prefix from the pipeline; say where it stood: every | first | (nowhere)."""
    drop_apart(spec, IMAGE_TOKEN)
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


def load_library(spec, path):
    """The library's tokenizer. Special tokens are found by data.Tokenizer, not in there."""
    try:
        lib = tokenizers.Tokenizer.from_str(json.dumps(spec))
        lib.encode_special_tokens = True
        cut = lib.pre_tokenizer
        if isinstance(lib.model, tokenizers.models.BPE) and (
                cut is None or len(cut.pre_tokenize_str("a b")) == 1):
            # The library keeps the pieces of each word that it has seen. To LLaMA's tokenizer a
            # whole text is one word, which seldom comes again: 2 KB of memory for every sample.
            lib.model._resize_cache(0)
        lib.encode("a ▁ é 😀\n", add_special_tokens=False)
        return lib
    except BaseException as error:
        # The library raises bare Exception, which has no subclass to name; anything more
        # specific (Ctrl-C, a bug of ours) must still get through.
        if type(error) is not Exception:
            raise
        raise BadModel(f"{path}: not a tokenizer ({error}): replace the file") from None


# ---------------------------------------------------------------- for data.Tokenizer

class TokenizerFile:
    """The files of a folder, and what is asked about added tokens. data.Tokenizer extends it.

    _lib: the library's tokenizer, to which no text is special; special_pattern: finds the added
    tokens in a text, the longest first."""

    def __init__(self, folder):
        parts = read_tokenizer(folder)
        self.folder, self.size, self._lib = Path(folder), parts.size, parts.lib
        self.prefix, self.prefix_in_file = parts.prefix, parts.prefix_in_file
        self.legacy, self.add_bos, self.max_length = parts.legacy, parts.add_bos, parts.max_length
        self.bos, self.eos, self.unk, self.pad = parts.bos, parts.eos, parts.unk, parts.pad
        self.added_by_config, self._added = parts.added_by_config, parts.added
        self._look_for(parts.added)

    def _look_for(self, tokens):
        longest_first = sorted(filter(None, tokens), key=len, reverse=True)
        # (?!) matches nothing
        self.special_pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def __len__(self):
        return self.size

    def library_pairs(self, text: str) -> list[tuple[int, int]]:
        """[(id, index of its first character)] of a text in which nothing is special."""
        try:
            coded = self._lib.encode(text, add_special_tokens=False)
        except TypeError:
            raise BadData("text holds half a surrogate pair: save it as valid UTF-8") from None
        return [(token, first) for token, (first, _) in zip(coded.ids, coded.offsets)]

    def library_decode(self, ids, skip_special: bool) -> str:
        """Text of the ids, all of them in the vocabulary."""
        if self.bos is not None and self.bos == self.eos == self.unk:
            ids = [i or self.eos for i in ids]      # quirk: InstructBLIP's 0 is one more </s>
        return self._lib.decode(ids, skip_special_tokens=skip_special)

    def token(self, i: int | None) -> str | None:
        """The text of an id, as the vocabulary has it."""
        return None if i is None else self._lib.id_to_token(i)

    def added(self, token: str, default=None):
        """Id of an added token such as <image>, or the default."""
        return self._added.get(token, default)

    def begins_special(self, text: str) -> bool:
        """Is the first token of the text an added one?"""
        return bool(self.special_pattern.match(text))

    def first_end(self, text: str, tokens_only: bool) -> str:
        """Where an answer ends that is followed by this text: at the added token that begins it,
        else, unless tokens_only, at all of it."""
        text = text.strip()
        found = self.special_pattern.match(text)
        if found:
            return found.group()
        return "" if tokens_only else text

    def fit(self, rows: int, template: str):
        """For a model of `rows` embeddings: special tokens beyond them, such as an unused [PAD] or
        <image>, are read as letters from now on. Raises BadModel if the template uses one."""
        beyond = {token: i for token, i in self._lib.get_vocab().items() if i >= rows}
        if not beyond:
            return
        needed, decoder = texts_of(template), self._lib.get_added_tokens_decoder()
        for token, i in sorted(beyond.items()):
            unused = i in decoder and decoder[i].special and token not in needed
            if not unused or i in (self.bos, self.eos, self.unk):
                raise BadModel(f"{self.folder}: the tokenizer's {token!r} is number {i}, the model "
                               f"has {rows} rows; take both from one place")
        self._look_for(set(self._added) - set(beyond))
        self.pad = first_id(self.pad, self.unk, self.eos, below=rows)
