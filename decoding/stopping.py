"""decoding/stopping.py: where an answer ends.

    "end"      the model has finished: a stop id, or its template's end where that is a text
    "stop"     one of the caller's stop texts came
    "length"   max_new_tokens were written
    "context"  the model's context is full

The ### that ends an answer of MiniGPT-4 or LLaVA v0 is one token or several, so a stop text is
looked for in the text and not in the ids. Tokens that may belong to one wait until it is clear:

    tokens   F0 9F 98 80 | cat | s. | E4 BD        stop texts: "ts"
    text        😀       | cat | s. | (incomplete)
                               ^ the "t" may begin "ts": " cat" waits until "s." is there"""

import copy

import data
from decoding.streaming import inner_decode, whole_groups
from formats.errors import UsageError


def stop_ids(model, eos=None):
    """Ids after which the model has finished: eos (an id or a set) if given, else those of its
    tokenizer, of its template and of its generation_config.json; of a bare llama.Llama, which has
    none of them, those of its config."""
    if eos is None and not hasattr(model, "tokenizer"):
        eos = model.config.eos
    if eos is not None or not hasattr(model, "tokenizer"):
        return set(eos) if isinstance(eos, (set, frozenset, tuple)) else {eos} - {None}
    return data.end_ids(model.template, model.tokenizer) | set(getattr(model, "stop_ids", ()))


class Stops:
    """What ends an answer of this model: `ids` {token id: reason} and `texts` {text: reason}."""

    def __init__(self, model, eos=None, stop=()):
        """eos: as for `stop_ids`; stop: a text or several. Raises UsageError for stop texts and a
        model without a tokenizer."""
        self.tokenizer = getattr(model, "tokenizer", None)
        if stop and self.tokenizer is None:
            raise UsageError("stop texts need a model with a tokenizer: give a VLM, or eos")
        self.ids = dict.fromkeys(stop_ids(model, eos), "end")
        stop = [stop] if type(stop) is str else stop
        self.texts = dict.fromkeys(stop, "stop")
        if eos is None and self.tokenizer is not None:
            end = data.stop_text(model.template, self.tokenizer)    # where it is no token
            if end:
                self.texts[end] = "end"
        # decoding leaves out special tokens, so a text that is a token is looked for by its id
        for text in list(self.texts):
            token = self.tokenizer.added(text)
            if token is not None:
                self.ids.setdefault(token, self.texts.pop(text))


class StopTexts:
    """Looks for stop texts in one answer, token by token.

    The answer ends before the first place in its text at which one of the texts stands, however
    the text is cut into tokens. The prompt is not searched.
    count: tokens handed out so far. rest: after the end, the characters before the stop text in
    the token (or character of several tokens) in which it begins; that token is not handed out."""

    def __init__(self, texts, tokenizer):
        """texts: {stop text: reason}."""
        self.texts, self.tokenizer = texts, tokenizer
        self.rest, self.count = "", 0
        self.begun = False                          # has any text been handed out?
        self.pending = []                           # whole groups that wait: [(tokens, text)]
        self.incomplete = []                        # behind them: tokens of half a character
        if texts:
            self.decode = inner_decode(tokenizer)
            # an added token (<|eot_id|>) decodes to nothing: it is known by its id
            self.ids = {tokenizer.added(text): reason for text, reason in texts.items()}

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
        groups, self.incomplete = whole_groups(self.incomplete + [token], self.decode)
        self.pending = self.pending + groups
        return self._hand_out(over=False)

    def finish(self):
        """`add` when no token follows: nothing has to wait."""
        if not self.texts:
            return [], None
        return self._hand_out(over=True)

    def _hand_out(self, over):
        text = "".join(text for _, text in self.pending)
        if self.incomplete:
            text += self.decode(self.incomplete).rstrip("\ufffd")
        # the first stop text that is whole: it ends the answer at `end`
        found = [(text.find(stop), stop) for stop in self.texts if stop in text]
        end, stop = min(found, default=(len(text), None))
        may_begin = len(text)
        if not over:
            may_begin = self._may_begin(text)
        if end > may_begin:                         # an earlier one may yet become whole
            end, stop = may_begin, None

        tokens, length = [], 0
        while self.pending and length + len(self.pending[0][1]) <= end:
            (group, piece), *self.pending = self.pending
            tokens, length = tokens + group, length + len(piece)
            self.begun = self.begun or bool(piece)
        if stop:
            self.rest = text[length:end]
            if not self.begun:
                self.rest = self._as_first(text[:end])
            if self.texts[stop] == "end":           # the space of " ###" is no part of the answer
                self.rest = self.rest.rstrip()
        elif over:
            tokens = tokens + self.incomplete
        self.count += len(tokens)
        return tokens, self.texts.get(stop)

    def _may_begin(self, text):
        """Where the first stop text may begin of which only a part is there."""
        for start in range(len(text)):
            if any(stop.startswith(text[start:]) for stop in self.texts):
                return start
        return len(text)

    def _as_first(self, rest):
        """The rest, if nothing stands before it: without the space that decoding drops."""
        group = self.incomplete
        if self.pending:
            group = self.pending[0][0]
        dropped = len(self.decode(group)) - len(self.tokenizer.decode(group))
        return rest[max(dropped, 0):]


class AnswerEnd:
    """Decides for one row of a batch what is handed out and when its answer has ended."""

    def __init__(self, stops, max_new, max_new_tokens, answer):
        """max_new: how many tokens fit; answer: an `Answer`, gets finish_reason and rest."""
        self.stops, self.answer, self.max_new = stops, answer, max_new
        self.texts = StopTexts(stops.texts, stops.tokenizer)
        self.count, self.done = 0, False
        self.limit = limit_reason(max_new, max_new_tokens)

    def add(self, token):
        """The tokens to hand out: none while it is unclear whether a stop text has begun, and then
        several. After the end always none."""
        if self.done:
            return []
        self.count += 1
        tokens, reason = [], self.stops.ids.get(token)
        if not reason:
            tokens, reason = self.texts.add(token)
        if not reason and self.count == self.max_new:
            reason = self.limit
        if reason:
            rest, found = self.texts.finish()
            tokens, self.done = tokens + rest, True
            self.answer.finish_reason = found or reason
            self.answer.rest = self.texts.rest
        return tokens


def limit_reason(max_new, max_new_tokens):
    """Why an answer of `max_new` tokens goes on no further."""
    return "length" if max_new == max_new_tokens else "context"


def cut_reason(finish_reason, model, max_new_tokens):
    """What to say of an answer that was cut; None for the others."""
    if finish_reason == "length":
        return f"cut at --max-new-tokens {max_new_tokens}: give more"
    if finish_reason == "context":
        return (f"cut where the model's context of {model.llm.config.context} places is full: use "
                "fewer words or pictures (/reset in a chat)")
    return None
