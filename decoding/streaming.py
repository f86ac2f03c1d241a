"""decoding/streaming.py: token ids become text while they come.

A character may be several tokens (an emoji is four byte tokens), and a token may hold several
characters. So text is decoded in groups: the fewest tokens whose text is whole characters.

    tokens   F0 9F 98 80 | cat | s. | E4 BD
    text        😀       | cat | s. | (incomplete: waits for the next token)"""


def inner_decode(tokenizer):
    """`tokenizer.decode` for tokens inside a text. At a text's start it drops a first space, so
    the tokens are decoded behind an "a", which is then taken off."""
    anchor = tokenizer.encode("a", bos=False)[-1:]
    length = len(tokenizer.decode(anchor))

    def decode(tokens):
        return tokenizer.decode(anchor + tokens)[length:]
    return decode


def whole_groups(tokens, decode):
    """([(tokens, text)] of whole characters, the tokens whose last character is incomplete).

    An incomplete character ends in U+FFFD. Behind bytes that never become a character the next
    whole one is a group of its own: a run of byte tokens is decoded as a whole or not at all."""
    last_character = range(max(1, len(tokens) - 4), len(tokens))    # UTF-8: at most 4 bytes
    for start in (0, *last_character):
        text = decode(tokens[start:])
        if not text.endswith("\ufffd") and (text or start == 0):
            group = (tokens[start:], text)
            stray = (tokens[:start], decode(tokens[:start]))
            return [stray, group] if start else [group], []
    return [], tokens


def stream_text(tokens, tokenizer):
    """Token ids -> pieces of text as they come, each of whole characters only.

    Bytes that never become a character are U+FFFD inside a text and nothing at its end.
    tokens: any iterable; the `rest` of a `Generation` or an `Answer` is the last piece."""
    decode, begun, incomplete = inner_decode(tokenizer), False, []
    for token in tokens:
        groups, incomplete = whole_groups(incomplete + [token], decode)
        for group, text in groups:
            yield text if begun else tokenizer.decode(group)
            begun = begun or bool(text)
    # `rest` is known only now, when the answer has ended
    rest = getattr(tokens, "rest", "")
    text = decode(incomplete) if begun else tokenizer.decode(incomplete)
    yield text + rest if rest else text.rstrip("\ufffd")
