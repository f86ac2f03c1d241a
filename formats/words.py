"""formats/words.py: where a text can be cut so that each piece gets the tokens it has in the whole.

BPE merges neighbours, so a piece may be tokenized alone if no token reaches across the cut.
Two kinds of tokenizers have such places, and tokenizer.json says which kind it is:

    LLaMA's: one long word      " The red  star"  ->  " The" " red" "  star"
                                before spaces: no token has a space (▁) behind another letter
    byte-level: SmolLM2's,      "a red\\n star!"   ->  "a" " red\\n star!"
    LLaMA-3's, Qwen's           before a space that stands behind no white space: there the pattern
                                that such a tokenizer begins with always cuts

A pattern may look ahead (white space before a word: all but its last), never behind. So a piece
that ends where a space follows a letter is the same alone. Other patterns are not taken apart.
"""

import json
import re

# which letters may stand in one token: GPT-2's pattern, which ByteLevel has by itself, and those of
# LLaMA-3 and Qwen-2. In none of them a space follows another letter.
LLAMA_3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
           r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
PATTERNS = LLAMA_3, LLAMA_3.replace("{1,3}", "")


def word_cutter(spec):
    """A function text -> pieces of it, for the tokenizer.json `spec`; None if we know no place."""
    model = spec["model"]
    if model["type"] != "BPE" or model["dropout"]:
        return None
    if has_long_words(spec):
        return cut_before_spaces
    if is_byte_level(spec):
        return cut_behind_words
    return None


def cut_before_spaces(text):
    return re.findall(" *[^ ]+| +", text)


def cut_behind_words(text):
    # Python's \s holds all that Rust's holds, and four control characters: there nothing is cut
    return re.split(r"(?<=\S)(?= )", text)


def has_long_words(spec) -> bool:
    """Is no token of this tokenizer.json longer than a word with the space before it?"""
    vocab, cut = spec["model"]["vocab"], spec["pre_tokenizer"] or {"type": "Metaspace"}
    steps = set(re.findall(r'"type": "(\w+)"', json.dumps(spec["normalizer"])))
    return ("▁" in vocab and not any("▁" in token.lstrip("▁") for token in vocab)
            and cut["type"] == "Metaspace" and steps <= {"Sequence", "Replace"})


def is_byte_level(spec) -> bool:
    """Is the text cut by one of the patterns that we know, and then turned into bytes?"""
    cut = spec["pre_tokenizer"] or {}
    steps = cut["pretokenizers"] if cut.get("type") == "Sequence" else [cut]
    normalizer = spec["normalizer"] or {"type": "NFC"}          # NFC joins no letter to a space
    if normalizer["type"] != "NFC" or not steps or steps[-1].get("type") != "ByteLevel":
        return False
    *before, last = steps
    cuts = last["use_regex"]
    for step in before:
        if step["type"] == "Split":
            known = step["pattern"].get("Regex") in PATTERNS and step["behavior"] == "Isolated"
            if not known or step["invert"]:
                return False
            cuts = True
        elif step["type"] != "Digits":                          # which parts digits from the rest
            return False
    return cuts and not last["add_prefix_space"]
