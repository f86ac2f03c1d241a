"""Which tokens a folder adds to its tokenizer.json, and under which ids.

Ids of added tokens are the library's, and so transformers': a token that tokenizer.json or
tokenizer_config.json puts beyond a gap gets the next free id, whatever number stands beside it.
Source: transformers 5.23, tokenization_utils_base.py (_from_pretrained) and
tokenization_utils_tokenizers.py (__init__); tests compare with AutoTokenizer."""
from pathlib import Path

from tokenizers import AddedToken

from formats.checkpoints import hub_id
from formats.errors import BadModel
from formats.strict_json import read_config

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
    named = {_content(config.get(key)) for key in NAMED}
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
    named, made = [config.get(key) for key in NAMED], []
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    named += extra.values() if type(extra) is dict else extra
    special = {_content(token) for token in named if token}
    decoder = config.get("added_tokens_decoder") or {}
    for _, token in sorted((int(i), token) for i, token in decoder.items()):
        made.append(_token(token, token["content"] in special))
    have = {token.content for token in made}
    made += [_token(token, True) for token in named if token and _content(token) not in have]
    return made


def _token(token, special):
    token = {"content": token, "normalized": not special} if type(token) is str else token
    flags = {key: token[key] for key in FLAGS if key in token}
    if type(token["content"]) is not str or any(type(x) is not bool for x in flags.values()):
        raise ValueError(f"not a token: {token}")
    return AddedToken(token["content"], **{**flags, "special": special or flags.get("special",
                                                                                    False)})


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
    """One line for a folder that has only the older file, which holds no merges to read here."""
    folder = Path(path).parent
    hub = hub_id(folder)                            # of which tokenizer.model was not fetched
    if not path.exists() and (hub or (folder / "tokenizer.model").exists()):
        raise BadModel(
            f"{hub or folder}: only tokenizer.model, and tokenizer.json is read here: convert it "
            "once, where transformers and sentencepiece are installed: python -c \"from "
            f"transformers import AutoTokenizer as T; T.from_pretrained('{hub or folder}')."
            f"save_pretrained('{folder}')\"; Vicuna's words are also in the tokenizer.json of "
            "llava-hf/llava-1.5-7b-hf")
