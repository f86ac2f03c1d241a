"""Exercise 4: the labels of a conversation.

A chat model is trained to predict the next token, but only of what the assistant says. So each
token has a label: its own id where it has loss, IGNORE (-100) where it has none. With loss in
[brackets]:

    <s>A chat ... USER: What is it? ASSISTANT:[ A cat.</s>]USER: Sure? ASSISTANT:[ Yes.</s>]

`segments` is the conversation in pieces: [(text, does it have loss?)]. Join the texts and tokenize
the whole, not each piece: a token can reach over the end of a piece. `encode_with_offsets(text)`
of the tokenizer gives [(id, index of its first character)]. A token has loss if its first
character lies in a piece with loss: in ("ASSISTANT: ", no loss), ("A cat.", loss) the token " A"
begins in the prompt, so it has none. BOS (`tokenizer.bos`) comes first, without loss. Labels are
not shifted here: the loss compares label t with the prediction made at t - 1.

    python -m exercises 4
"""
from data import IGNORE  # noqa: F401


def label_mask(segments, tokenizer):
    """[(text, bool)], a data.Tokenizer -> (ids, labels), two lists of one length."""
    raise NotImplementedError
