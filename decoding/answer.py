"""decoding/answer.py: an answer while it is written, and after.

finish_reason   "end", "stop", or, where the answer was cut, "length" or "context":
                see decoding/stopping.py
rest            characters before the stop text in the token in which it begins. That token is
                not handed out; `stream_text` writes the characters behind the last token"""

import time


class Answer(list):
    """The token ids of an answer, without its end."""
    finish_reason, rest = None, ""


class Generation:
    """Iterator of the token ids of an answer. After the last one it has finish_reason and rest.

    tokens, times   the ids so far, and when each came (time.perf_counter)"""

    def __init__(self, rows, tokens):
        """rows: of `generate_rows`, which sets the finish_reason of `tokens`, an `Answer`."""
        self.rows, self.tokens, self.times = rows, tokens, []
        self.pending = []                           # ids of a step that are not handed out yet

    def __iter__(self):
        return self

    def __next__(self):
        while not self.pending:
            self.pending = list(next(self.rows)[0])
        self.tokens.append(self.pending.pop(0))
        self.times.append(time.perf_counter())
        return self.tokens[-1]

    @property
    def finish_reason(self):
        return self.tokens.finish_reason

    @property
    def rest(self):
        return self.tokens.rest
