"""decoding/beam.py: beam search keeps several beginnings of an answer and extends them together.

    step        1           2            3              sums of log-probabilities, 2 beams
                a  -0.4     a b -0.9     a b </s> -1.1      ended: mean -0.37
                c  -1.1     a d -1.2     a d e    -1.9      runs:  mean -0.63

transformers' rule (early_stopping False): of the likeliest continuations of the running beams,
those that end are put aside, and the best `num_beams` others run on, until `num_beams` have ended
and none that runs has a better mean. The end counts as a token.

The mean is the sum divided by length ** length_penalty: 1 is the mean, 0 the sum, which favours
short answers, and -1, with which BLIP-2 answers questions, favours them more."""

from typing import NamedTuple

import torch

from decoding.logits import ids_seen, nan_error, repetition_penalty, written_so_far
from decoding.stopping import StopTexts


class Beam(NamedTuple):
    """A beginning of an answer."""
    score: float            # sum of log-probabilities
    parent: int             # its row of the cache one step ago
    tokens: list
    texts: StopTexts        # looks for stop texts in it


class Ended(NamedTuple):
    """An answer; the best is the largest."""
    mean: float             # log-probability a token, the end included
    tokens: list
    reason: str
    rest: str


def next_scores(llm, x, cache, beams, prompt, penalty):
    """(beams, V): the sum of log-probabilities of every beam with every next token."""
    scores = llm.next_logits(x, cache).log_softmax(-1)
    if scores.isnan().any():
        raise nan_error(llm)
    if penalty != 1:
        (before,) = written_so_far(llm, [list(prompt)])
        seen = ids_seen([before + beam.tokens for beam in beams], scores.shape[1], scores.device)
        scores = repetition_penalty(scores, seen, penalty)
    return scores + scores.new_tensor([[beam.score] for beam in beams])


def extend(beams, scores, stops, num_beams, divisor):
    """(the best beams that run on, the answers that have ended in this step)."""
    # so many that `num_beams` of them do not end
    wanted = num_beams * (1 + len(stops.ids) + bool(stops.texts))
    best = scores.flatten().topk(min(wanted, scores.numel()))
    running, ended = [], []
    for rank, (score, at) in enumerate(zip(best.values.tolist(), best.indices.tolist())):
        parent, token = divmod(at, scores.shape[1])
        tokens, texts = beams[parent].tokens + [token], beams[parent].texts.copy()
        if token in stops.ids:
            reason = texts.finish()[1] or stops.ids[token]
        else:
            _, reason = texts.add(token)
        if not reason and len(running) < num_beams:
            running.append(Beam(score, parent, tokens, texts))
        elif reason and rank < num_beams:
            ended.append(Ended(score / divisor, tokens[:texts.count], reason, texts.rest))
    return running, ended


@torch.inference_mode()
def beam_search(llm, x, cache, prompt, max_new, stops, num_beams, penalty=1.0, limit="length",
                length_penalty=1.0):
    """The best answer, `Ended`.

    x (1, T, C): the embeddings of the prompt; cache: an empty KVCache of one row; prompt: its ids;
    max_new: most tokens of an answer; limit: the finish_reason of one that takes them all;
    penalty: of repetition."""
    beams, ended = [Beam(0.0, 0, [], StopTexts(stops.texts, stops.tokenizer))], []
    for step in range(1, max_new + 1):
        scores = next_scores(llm, x, cache, beams, prompt, penalty)
        divisor = step ** length_penalty
        beams, new = extend(beams, scores, stops, num_beams, divisor)
        ended = sorted(ended + new, reverse=True)[:num_beams]
        # a running beam's sum can only fall, so its mean now stands for what it can reach
        if not beams or len(ended) == num_beams and ended[-1].mean >= beams[0].score / divisor:
            return max(ended)
        parents = [beam.parent for beam in beams]
        cache.reorder(torch.tensor(parents, device=x.device))
        x = torch.tensor([[beam.tokens[-1]] for beam in beams], device=x.device)    # (beams, 1)
    for beam in beams:
        reason = beam.texts.finish()[1] or limit
        mean = beam.score / max_new ** length_penalty
        ended.append(Ended(mean, beam.tokens[:beam.texts.count], reason, beam.texts.rest))
    return max(ended)
