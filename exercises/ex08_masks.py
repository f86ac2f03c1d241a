"""Exercise 8: the three masks of the Q-Former.

A row holds n learned queries and then the text. Who may see whom depends on what is trained:

    itc  contrast: queries see queries, text sees text. Two towers in one row.
    itm  matching: everything sees everything.
    itg  writing: queries see queries; a text token sees the queries, the text before it and itself.

A mask is a question about two positions: may the token at q see the one at k? Positions below n
are queries. q is a column (T, 1) and k a row (1, T) of positions, so an expression of the two is
the whole matrix (T, T), which itm returns, too. Write it with comparisons and & | ==. `and`, `or`
and `if` want one answer and do not work on a matrix; the GPU kernel compiles these functions.

    python -m exercises 8
"""


def itc(q, k, n):
    """q (T, 1), k (1, T), n a number -> (T, T) bool; so are the two below."""
    raise NotImplementedError


def itm(q, k, n):
    raise NotImplementedError


def itg(q, k, n):
    raise NotImplementedError
