"""TODO"""

import torch

from decoding.stopping import damaged, ids_seen, repetition_penalty
from llama import KVCache


@torch.inference_mode()
def beam_search(llm, x, room, ids, ends, width, watch, penalty, cut):
    """(tokens, finish_reason, rest) of the answer with the best mean log-probability, its end
    counted.

    x (1, T, C): the prompt's embeddings; room: most tokens of an answer, and `cut` the reason if
    it takes all; ids: the prompt's; ends: {id: reason}; watch: a StopTexts.
    Of the likeliest continuations of `width` beginnings, those that end are put aside and the
    best `width` others go on, until `width` have ended and none that runs has a better mean:
    transformers' rule (length_penalty 1, early_stopping False)."""
    memory = KVCache(llm.config, 1, x.shape[1] + room, x)
    # (sum of log-probabilities, parent, tokens, what looks for stop texts in them)
    running, done = [(0.0, 0, [], watch)], []
    for step in range(1, room + 1):
        scores = llm.next_logits(x, memory).log_softmax(-1)                             # (n, V)
        if scores.isnan().any():
            raise damaged(llm)
        if penalty != 1:
            seen = ids_seen([ids + row for _, _, row, _ in running], scores.shape[1], scores.device)
            scores = repetition_penalty(scores, seen, penalty)
        scores = scores + scores.new_tensor([[score] for score, *_ in running])
        wanted = width * (1 + len(ends) + bool(watch.texts))
        best, heads = scores.flatten().topk(min(wanted, scores.numel())), []
        for rank, (score, at) in enumerate(zip(best.values.tolist(), best.indices.tolist())):
            parent, token = divmod(at, scores.shape[1])
            tokens, watch = running[parent][2] + [token], running[parent][3].copy()
            if token in ends:
                reason = watch.finish()[1] or "end"
            else:
                _, reason = watch.add(token)
            if not reason and len(heads) < width:
                heads.append((score, parent, tokens, watch))
            elif reason and rank < width:
                done.append((score / step, tokens[:watch.count], reason, watch.rest))
        done, running = sorted(done, reverse=True)[:width], heads
        if not heads or len(done) == width and done[-1][0] >= heads[0][0] / step:
            break
        parents = torch.tensor([parent for _, parent, *_ in heads], device=x.device)
        memory.reorder(parents)
        x = torch.tensor([[tokens[-1]] for _, _, tokens, _ in heads], device=x.device)  # (n, 1)
    else:
        for score, _, tokens, watch in running:
            reason = watch.finish()[1] or cut
            done.append((score / room, tokens[:watch.count], reason, watch.rest))
    _, tokens, *why = max(done)
    return tokens, *why
