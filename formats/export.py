"""TODO"""

import json
from pathlib import Path

from formats.conversations import IMAGE_TOKEN
from formats.prefix import write_prefix
from formats.strict_json import read_model_json
from formats.templates import opening, write_jinja
from formats.tokenizers import token_dict, tokenizer_config


def save_tokenizer(words, folder, extra=(), apart=False):
    """Copy tokenizer.json and its config; `extra` tokens get the next free ids.

    apart: others shall tokenise what follows <image> as `encode` does."""
    folder = Path(folder)
    spec = read_model_json(words.folder / "tokenizer.json", 64_000_000)
    config = tokenizer_config(words.folder)
    config.pop("added_tokens_decoder", None)        # all are in tokenizer.json, with their ids
    spec["added_tokens"] = spec.get("added_tokens") or []
    for token in spec["added_tokens"]:
        token["id"] = words.added(token["content"], token["id"])
    spec["added_tokens"] += [{"id": words.added(token.content), **token_dict(token)}
                             for token in words.added_by_config]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    new = [token for token in extra if words.added(token) is None]
    for i, token in enumerate(new):
        spec["added_tokens"].append({"id": len(words) + i, "content": token, **flags,
                                     "special": True})
    if "<pad>" in extra:
        config["pad_token"] = "<pad>"
    if apart:
        config.pop("chat_template", None)           # a language model's: ours is in its own file
        write_prefix(spec, words.prefix_in_file, words.prefix, IMAGE_TOKEN)
    (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


def chat_template(t, words=None) -> str | None:
    """A data.Template in Jinja, as transformers' processor renders it: the same text as `prompt`, from
    texts and from lists of parts. In a text <image> is a picture; a first turn from "system"
    replaces the template's system text.

    words: as a tokenizer alone renders it, which adds no BOS: the text begins with it.
    None where it is not written here: transformers then asks for one, and does not ask wrongly."""
    if t.style not in ("two", "chat", "llama2", "single", "plain"):
        return None
    if words is None or not words.add_bos:
        return write_jinja(t)
    begins = t.style != "plain" and words.begins_special("[INST]" if t.style == "llama2" else
                                                         opening(t))
    return write_jinja(t, bos=True, space=words.prefix == "first" and not begins)
