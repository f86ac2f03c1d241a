"""stopping.py: token ids become text while they come, and stop texts are looked for in it.

A character may be several tokens (an emoji is four byte tokens), and a token may hold several
characters. So both work on groups: the fewest tokens whose text is whole characters.

    tokens   F0 9F 98 80 | cat | s. | E4 BD        stop texts: "ts"
    text        😀       | cat | s. | (waits)
                               ^ the "t" may begin "ts": " cat" waits until "s." is there
"""

import copy

import torch

import data
from formats.checkpoints import dtype_name


def inner_decode(tokenizer):
    """`tokenizer.decode` for tokens inside a text: at its start it drops a first space."""
    anchor = tokenizer.encode("a", bos=False)[-1:]
    length = len(tokenizer.decode(anchor))
    return lambda tokens: tokenizer.decode(anchor + tokens)[length:]


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


def spell(tokens, tokenizer):
    """Token ids -> pieces of text as they come, each of whole characters only.

    Bytes that never become a character are U+FFFD inside a text and nothing at its end.
    tokens: any iterable; the `rest` of a `Generation` or `Tokens` is the last piece."""
    decode, begun, pending = inner_decode(tokenizer), False, []
    for token in tokens:
        groups, pending = whole_groups(pending + [token], decode)
        for group, text in groups:
            yield text if begun else tokenizer.decode(group)
            begun = begun or bool(text)
    rest = getattr(tokens, "rest", "")
    text = decode(pending) if begun else tokenizer.decode(pending)
    yield text + rest if rest else text.rstrip("\ufffd")


class StopTexts:
    """Looks for stop texts in one answer. Tokens that may belong to one are held back.

    The answer ends before the first place in its text at which one of the texts stands, however
    the text is cut into tokens. The prompt is not searched.
    count: tokens handed out so far. rest: after the end, the characters before the stop text in
    the token (or character of several tokens) in which it begins; that token is not handed out."""

    def __init__(self, texts, tokenizer):
        """texts: {stop text: "stop", or "end" if it is the template's}."""
        self.texts, self.tokenizer = texts, tokenizer
        self.rest, self.count, self.begun = "", 0, False
        self.held, self.pending = [], []            # whole groups, then an incomplete character
        if texts:
            self.decode = inner_decode(tokenizer)
            # an added token (<|eot_id|>) decodes to nothing: it is known by its id
            self.ids = {tokenizer.added(text): why for text, why in texts.items()}

    def copy(self):
        """For another beam: lists are replaced, never changed in place."""
        return copy.copy(self)

    def add(self, token):
        """(tokens to hand out, why the answer has ended or None)."""
        if not self.texts:
            self.count += 1
            return [token], None
        if token in self.ids:
            tokens, reason = self.finish()
            return tokens, reason or self.ids[token]
        groups, self.pending = whole_groups(self.pending + [token], self.decode)
        self.held = self.held + groups
        return self._hand_out(over=False)

    def finish(self):
        """`add` when no token follows: nothing has to wait."""
        return self._hand_out(over=True) if self.texts else ([], None)

    def _hand_out(self, over):
        tail = self.decode(self.pending).rstrip("\ufffd") if self.pending else ""
        text = "".join(text for _, text in self.held) + tail
        places = [(text.find(stop), stop) for stop in self.texts if stop in text]
        end, found = min(places, default=(len(text), None))
        may_begin = len(text) if over else self._may_begin(text)
        if end > may_begin:                         # an earlier one may yet become whole
            end, found = may_begin, None
        tokens, length = [], 0
        while self.held and length + len(self.held[0][1]) <= end:
            group, piece = self.held[0]
            tokens, length, self.held = tokens + group, length + len(piece), self.held[1:]
            self.begun = self.begun or bool(piece)
        if found:
            self.rest = text[length:end] if self.begun else self._as_first(text[:end])
            if self.texts[found] == "end":          # the space of " ###" is no part of the answer
                self.rest = self.rest.rstrip()
        elif over:
            tokens = tokens + self.pending
        self.count += len(tokens)
        return tokens, self.texts.get(found)

    def _may_begin(self, text):
        """Where the first stop text may begin of which only a part is there."""
        for start in range(len(text)):
            if any(stop.startswith(text[start:]) for stop in self.texts):
                return start
        return len(text)

    def _as_first(self, rest):
        """The rest, if nothing stands before it: without the space that decoding drops."""
        group = self.held[0][0] if self.held else self.pending
        dropped = len(self.decode(group)) - len(self.tokenizer.decode(group))
        return rest[max(dropped, 0):]


def stop_ids(model, eos=None):
    """Ids after which the model has finished: eos (an id or a set) if given, else those of its
    tokenizer, of its template and of its generation_config.json."""
    if eos is not None or not hasattr(model, "tokenizer"):
        return eos if isinstance(eos, (set, frozenset)) else {eos}
    return data.end_ids(model.template, model.tokenizer) | set(getattr(model, "stop_ids", ()))


def stop_text(model, eos=None):
    """The text that ends an answer, where its template has an end that is no token, or None."""
    if eos is not None or not hasattr(model, "tokenizer"):
        return None
    return data.stop_text(model.template, model.tokenizer)


def repetition_penalty(scores, seen, penalty):
    """scores (B, V), logits or log-probabilities; seen (B, V) bool."""
    less = torch.where(scores < 0, scores * penalty, scores / penalty)
    return torch.where(seen, less, scores)


def ids_seen(prompts, vocab, device):
    """(B, V) bool: which ids stand in each prompt."""
    seen = torch.zeros(len(prompts), vocab, dtype=torch.bool)
    for row, ids in zip(seen, prompts):
        row[[i for i in ids if i >= 0]] = True
    return seen.to(device)


def limit(room, max_new_tokens):
    """Why an answer of `room` tokens goes on no further."""
    return "length" if room == max_new_tokens else "context"


def damaged(llm):
    """The error of an output that is not a number. Weights from a file were finite when loaded."""
    here = llm.embed.weight.dtype
    if here != torch.float32 and all(p.isfinite().all() for p in llm.parameters()):
        other = "--dtype bf16 or fp32" if here == torch.float16 else "--dtype fp32"
        return data.BadModel("the model's output is not a number (NaN): its weights are whole, but "
                             f"what is computed from them is too large for {dtype_name(here)};"
                             f" take {other}")
    return data.BadModel("the model's output is not a number (NaN): its weights are damaged; take "
                         "another checkpoint")
