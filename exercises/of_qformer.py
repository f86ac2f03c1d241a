"""exercises.of_qformer: exercises 8 to 10, the Q-Former's masks and two of its losses.

For each: the project's own function in the exercise's signature, small inputs, classic mistakes.
"""
import torch
import torch.nn.functional as F

import qformer
from exercises.checking import Caught, Exercise, Misfit

MASKS = {"itc": qformer.itc, "itm": qformer.itm, "itg": qformer.itg}


# ------------------------------------------------------------------------------ 8: masks

def mask(name, q, k, n):
    return MASKS[name](q, k, n)


def mask_cases():
    return [(name, torch.arange(T)[:, None], torch.arange(T)[None], n)
            for name in MASKS for n, T in ((2, 5), (3, 8), (1, 4))]


def whole_matrix(seen, arguments):
    """A mask is a (T, T) bool: the kernel has no place for one answer to all questions."""
    name, q, k, _ = arguments
    shape, rest = (len(q), k.shape[1]), "; q and k together have the shape of the whole matrix"
    if not torch.is_tensor(seen):
        raise Misfit(f"{name} returns {seen!r}: it must be a {shape} bool tensor{rest}")
    if seen.shape != shape:
        raise Misfit(f"{name} has shape {tuple(seen.shape)}, expected {shape}{rest}")
    if seen.dtype != torch.bool:
        raise Misfit(f"{name} is {seen.dtype}, it must be torch.bool: take comparisons and & | ==")
    return seen


def for_the_kernel(function, arguments):
    """Runs a rule; it must also answer for one q and one k. What makes a matrix by its size does
    not, and a kernel, which asks tile by tile, could not compile it."""
    name, _, _, n = arguments
    result = function(*arguments)
    with Caught() as caught:
        one = function(name, torch.tensor(3), torch.tensor(1), n)
    if result is not None and (caught.error or torch.is_tensor(one) and one.dim()):
        raise Misfit(f"{name} must answer for one q and one k, too: the kernel asks it tile by "
                     "tile; take comparisons of q, k and n, and & | ==")
    return result


def grids(found, right, arguments):
    """Your mask and the right one side by side, if they are small."""
    (_, yours), (_, theirs) = found[0], right[0]
    name, q, _, n = arguments
    if len(q) > 8:
        return ""
    lines = [f"   {f'{name}, n = {n}: yours':{2 * len(q) + 12}}right"]
    for row, wanted in zip(yours.tolist(), theirs.tolist()):
        a, b = (" ".join(".#"[seen] for seen in line) for line in (row, wanted))
        lines.append(f"   {a:{2 * len(q) + 12}}{b}")
    return "\n".join(lines)


def mask_that(name, rule):
    """A mistake in one of the three; the others are right."""
    def mistake(asked, q, k, n):
        return rule(q, k, n) if asked == name else mask(asked, q, k, n)
    return mistake


def either(name, rule, what):
    """The mistakes that itc and itg can both have."""
    own = MASKS[name]
    return ((f"it is the wrong way round, True where the token may not look: {what}",
             mask_that(name, lambda q, k, n: ~own(q, k, n))),
            (f"off by one, the queries are the positions below n: {what}",
             mask_that(name, lambda q, k, n: own(q, k, n + 1))),
            (f"off by one, the queries are the positions below n: {what}",
             mask_that(name, lambda q, k, n: own(q, k, n - 1))),
            (f"that is {rule}: {what}", mask_that(name, MASKS[rule])))


# what is said, and the rule that makes the mistake
OF_ITC = (
    ("text sees the queries: in contrast each side must stand alone", MASKS["itg"]),
    ("text sees the queries: in contrast each side must stand alone",
     lambda q, k, n: (k < n) | (q >= n)),
    ("the queries see the text: in contrast each side must stand alone",
     lambda q, k, n: (q < n) | (k >= n)),
    ("text sees nothing: it sees all text", lambda q, k, n: (q < n) & (k < n)),
    ("the queries see nothing: they see all queries", lambda q, k, n: (q >= n) & (k >= n)),
    ("text sees only the text before it: that is for writing",
     lambda q, k, n: ((q < n) & (k < n)) | ((q >= n) & (k >= n) & (k <= q))))
OF_ITG = (
    ("rows and columns are exchanged, the mask is transposed: q looks, k is seen",
     lambda q, k, n: MASKS["itg"](k, q, n)),
    ("text is causal the wrong way round: a token sees the text before it, k <= q",
     lambda q, k, n: (k < n) | ((q >= n) & (k >= q))),
    ("off by one: a text token does not see itself",
     lambda q, k, n: (k < n) | ((q >= n) & (k < q))),
    ("off by one: a text token sees the next one, which it has to write",
     lambda q, k, n: (k < n) | ((q >= n) & (k <= q + 1))),
    ("the queries are causal, too: they all see each other", lambda q, k, n: k <= q),
    ("the queries see the text: what they find would come from the caption, not from the picture",
     lambda q, k, n: (q < n) | (k < n) | (k <= q)),
    ("the queries see nothing: they all see each other",
     lambda q, k, n: (q >= n) & ((k < n) | (k <= q))),
    ("text sees the text behind it: a token would read what it has to write",
     lambda q, k, n: (k < n) | (q >= n)),
    ("text does not see the queries: it could only guess what is in the picture",
     lambda q, k, n: ((q < n) & (k < n)) | ((q >= n) & (k >= n) & (k <= q))),
    ("that is itm: everything sees everything", MASKS["itm"]))
OF_ITM = (
    ("everything sees everything: that is causal", lambda q, k, n: k <= q),
    ("everything sees everything: that is itc", MASKS["itc"]),
    ("everything sees everything: that is itg", MASKS["itg"]),
    ("it is the wrong way round, True where the token may not look",
     lambda q, k, n: ~MASKS["itm"](q, k, n)))
MASK = Exercise(
    8, "ex08_masks.py", ("itc", "itm", "itg"), "itc, itm and itg in qformer.py", mask, mask_cases,
    (*either("itc", "itm", "queries and text must not see each other"),
     *((said, mask_that("itc", rule)) for said, rule in OF_ITC),
     *either("itg", "itc", "text sees the queries, queries see no text"),
     *((said, mask_that("itg", rule)) for said, rule in OF_ITG),
     *((said, mask_that("itm", rule)) for said, rule in OF_ITM)),
    ("mask",), whole_matrix, run=for_the_kernel, drawing=grids, strict=True)


# ------------------------------------------------------------------------------ 9: ITC

def itc_loss(image, text, temp):
    sims = qformer.similarities(image, text, image, text, temp)
    return qformer.itc_loss(*sims, torch.eye(len(text), dtype=torch.bool))


def contrast_cases():
    rng = torch.Generator().manual_seed(9)
    return [(F.normalize(torch.randn(B, Q, 8, generator=rng), dim=-1),
             F.normalize(torch.randn(B, 8, generator=rng), dim=-1), temp)
            for B, Q, temp in ((4, 3, .07), (6, 5, .5))]


def contrast_that(pool=lambda x: x.amax(1), scale=lambda x, temp: x / temp, smoothing=.1,
                  both=lambda a, b: (a + b) / 2):
    """The loss with one part changed; pool: (B, Q, B) -> (B, B)."""
    def mistake(image, text, temp):
        scores = scale(pool(torch.einsum("bqe,ne->bqn", image, text)), temp)
        right = torch.arange(len(text))
        a, b = (F.cross_entropy(x, right, label_smoothing=smoothing) for x in (scores, scores.T))
        return both(a, b)
    return mistake


ITC = Exercise(
    9, "ex09_itc_loss.py", ("itc_loss",), "similarities and itc_loss in qformer.py", itc_loss,
    contrast_cases,
    (("the mean over the queries is taken: it is the best one, the maximum",
      contrast_that(pool=lambda x: x.mean(1))),
     ("only the first query is compared: the best of all Q counts",
      contrast_that(pool=lambda x: x[:, 0])),
     ("the queries are added up: the best one counts, the maximum",
      contrast_that(pool=lambda x: x.sum(1))),
     ("the scores are multiplied by the temperature: divide by it",
      contrast_that(scale=lambda x, temp: x * temp)),
     ("there is no temperature: divide the scores by it", contrast_that(scale=lambda x, temp: x)),
     ("only pictures look for their text: texts look for their picture, too",
      contrast_that(both=lambda a, b: a)),
     ("only texts look for their picture: pictures look for their text, too",
      contrast_that(both=lambda a, b: b)),
     ("the two losses are added: their mean is the loss", contrast_that(both=lambda a, b: a + b)),
     ("the target is not smoothed: the right one has 0.9, and all B share 0.1",
      contrast_that(smoothing=0.))),
    ("loss",))


# ------------------------------------------------------------------------------ 10: negatives

def negative_cases():
    rng, cases = torch.Generator().manual_seed(10), []
    for B, seed in ((8, 0), (8, 1), (6, 2)):
        same = torch.eye(B, dtype=torch.bool)
        same[0, 1] = same[1, 0] = True                  # two pictures with one caption
        cases.append((3 * torch.randn(B, B, generator=rng), 3 * torch.randn(B, B, generator=rng),
                      same, seed))
    every = torch.eye(3, dtype=torch.bool)
    every[2] = True                                     # row 2 has no wrong column
    return [*cases, (torch.randn(3, 3, generator=rng), torch.randn(3, 3, generator=rng), every, 3)]


def draw_by(scores=lambda x: x, hide=lambda same: same, swap=False, none=-1):
    """Negatives with one part changed."""
    def mistake(to_text, to_image, same, seed=0):
        u = torch.rand(len(same), 2, generator=torch.Generator().manual_seed(seed)).T
        rows = torch.stack((to_text, to_image) if swap else (to_image, to_text))
        weights = scores(rows.double()).masked_fill(hide(same), -torch.inf).softmax(-1)
        sums = weights.nan_to_num(0).cumsum(-1)
        drawn = (sums <= (u * sums[..., -1])[..., None]).sum(-1)
        return drawn.masked_fill(same.all(1), none)
    return mistake


def only_diagonal(same):
    return torch.eye(len(same), dtype=torch.bool) | same.all(1, keepdim=True)


def nothing_hidden(same):
    return same.all(1, keepdim=True).expand_as(same)


NEGATIVES = Exercise(
    10, "ex10_hard_negatives.py", ("hard_negatives",), "hard_negatives in qformer.py",
    qformer.hard_negatives, negative_cases,
    (("the right columns are not taken out: a pair would be its own negative",
      draw_by(hide=nothing_hidden)),
     ("only the diagonal is taken out: another picture with the same caption is right, too, `same` "
      "says which", draw_by(hide=only_diagonal)),
     ("`same` is the wrong way round: the right columns are drawn, not the wrong ones",
      draw_by(hide=lambda same: ~same | same.all(1, keepdim=True))),
     ("all wrong columns have the same weight: the more similar, the likelier",
      draw_by(scores=torch.zeros_like)),
     ("always the most similar is taken: it is drawn, by softmax",
      lambda to_text, to_image, same, seed=0: torch.stack([
          x.masked_fill(same, -torch.inf).argmax(-1).masked_fill(same.all(1), -1)
          for x in (to_image, to_text)])),
     ("the least similar are drawn: the sign of the scores is wrong", draw_by(scores=torch.neg)),
     ("images and texts are exchanged: the first row is of images, drawn from to_image",
      draw_by(swap=True)),
     ("a row without a wrong column must give -1", draw_by(none=0)),
     ("a row without a wrong column must give -1", draw_by(none=3))),
    ("columns",))

EXERCISES = (MASK, ITC, NEGATIVES)
