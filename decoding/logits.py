"""decoding/logits.py: the repetition penalty, and the error of logits that are not numbers.

A penalty r divides by r the logits above 0 of all ids that stand in the prompt or the answer, and
multiplies by r those below [CTRL, 1909.05858]. The demos of InstructBLIP and MiniGPT-4 take 1.5
and 1.05."""

import torch

import data
from formats.checkpoints import dtype_name


def ids_seen(prompts, vocab, device):
    """(B, V) bool: which ids stand in each prompt."""
    seen = torch.zeros(len(prompts), vocab, dtype=torch.bool)
    for row, ids in zip(seen, prompts):
        row[[i for i in ids if i >= 0]] = True              # an image id is negative
    return seen.to(device)


def written_so_far(llm, prompts):
    """The ids of each row that count as seen: the prompt's, or a T5's start token, because its
    answer begins anew."""
    start = getattr(llm.config, "start", None)
    return prompts if start is None else [[start]] * len(prompts)


def repetition_penalty(scores, seen, penalty):
    """scores (B, V), logits or log-probabilities; seen (B, V) bool -> (B, V)."""
    lower = torch.where(scores < 0, scores * penalty, scores / penalty)
    return torch.where(seen, lower, scores)


def nan_error(llm):
    """The error of an output that is not a number. Weights from a file were finite when loaded."""
    dtype = llm.embed.weight.dtype
    if dtype != torch.float32 and all(p.isfinite().all() for p in llm.parameters()):
        other = "--dtype bf16 or fp32" if dtype == torch.float16 else "--dtype fp32"
        return data.BadModel("the model's output is not a number (NaN): its weights are whole, but "
                             f"what is computed from them is too large for {dtype_name(dtype)};"
                             f" take {other}")
    return data.BadModel("the model's output is not a number (NaN): its weights are damaged; take "
                         "another checkpoint")
