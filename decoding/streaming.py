"""decoding/streaming.py: token ids become text while they come.

A character may be several tokens (an emoji is four byte tokens), and a token may hold several
characters. So text is decoded in groups: the fewest tokens whose text is whole characters.

    tokens   F0 9F 98 80 | cat | s. | E4 BD
    text        😀       | cat | s. | (incomplete: waits for the next token)"""


def inner_decode(tokenizer, skip_special=True):
    """`tokenizer.decode` for tokens inside a text. At a text's start it drops a first space, so
    the tokens are decoded behind an "a", which is then taken off."""
    anchor = tokenizer.encode("a", bos=False)[-1:]
    length = len(tokenizer.decode(anchor))

    def decode(tokens):
        return tokenizer.decode(anchor + tokens, skip_special)[length:]
    return decode


def whole_groups(tokens, decode):
    """([(tokens, text)] of whole characters, the tokens whose last character is incomplete).

    An incomplete character ends in U+FFFD. Behind bytes that never become a character the next
    whole one is a group of its own: a run of byte tokens is decoded as a whole or not at all."""
    last_character = range(max(1, len(tokens) - 4), len(tokens))    # UTF-8: at most 4 bytes
    for start in (0, *last_character):
        text = decode(tokens[start:])
        if text.endswith("\ufffd"):
            continue
        if start == 0:
            return [(tokens, text)], []         # the usual case
        if text:                                # the bytes before it will never be a character
            stray = (tokens[:start], decode(tokens[:start]))
            return [stray, (tokens[start:], text)], []
    return [], tokens


def stream_text(tokens, tokenizer):
    """Token ids -> pieces of text as they come, each of whole characters only.

    Bytes that never become a character are U+FFFD inside a text and nothing at its end.
    tokens: any iterable; the `rest` of a `Generation` or an `Answer` is the last piece."""
    decode = tokenizer.decode                   # until the text has begun: drops a first space
    inner, incomplete = inner_decode(tokenizer), []
    for token in tokens:
        groups, incomplete = whole_groups(incomplete + [token], inner)
        for group, text in groups:
            yield decode(group)
            if text:
                decode = inner
    text = decode(incomplete)
    rest = getattr(tokens, "rest", "")          # known only now, when the answer has ended
    if rest:
        yield text + rest
    else:
        yield text.rstrip("\ufffd")             # half a character at the end is nothing
