"""llms/suffix.py: a row that holds prompt and answer becomes an encoder's row and a decoder's.

    ids        <image>  a  cat  </s>  on  a  mat  </s>  .        .: padding
    labels     .        .  .    .     on  a  mat  </s>  .        .: no loss

    prompt     <image>  a  cat  </s>                             what has no loss
    answer     <pad>  on  a  mat                                 from the start token on
    targets    on  a  mat  </s>                                  the next one of each
"""

from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from data import IGNORE


class Split(NamedTuple):
    """An encoder's rows and a decoder's."""
    prompt: torch.Tensor            # (B, S, C) embeddings
    mask: torch.Tensor              # (B, S) bool, False at padding
    answer: torch.Tensor            # (B, T) ids, the start token first, padded on the right
    place: tuple                    # two (N,): rows and columns of `answer`, before each target
    targets: torch.Tensor           # (N,) the tokens with loss, row by row


def unpack(x, labels, doc_spans):
    """One packed row x (1, T, C) and labels (1, T) -> padded rows and their mask (B, T')."""
    lengths = doc_spans[0, 0].unique_consecutive(return_counts=True)[1].tolist()
    x = pad_sequence(x[0].split(lengths), batch_first=True)
    labels = pad_sequence(labels[0].split(lengths), batch_first=True, padding_value=IGNORE)
    sizes = torch.tensor(lengths, device=x.device)[:, None]
    return x, labels, torch.arange(x.shape[1], device=x.device) < sizes


def split_rows(x, labels, mask, start, pad):
    """x (B, T, C), labels (B, T), mask (B, T) bool or None -> `Split`. start, pad: ids."""
    has_loss = labels != IGNORE
    is_prompt = ~has_loss if mask is None else mask & ~has_loss
    S = int(is_prompt.any(0).nonzero().max()) + 1           # the longest prompt
    row, at = has_loss.nonzero(as_tuple=True)               # (N,) each, row by row
    column = (has_loss.cumsum(1) - 1)[row, at]              # 0, 1 ... in each row
    targets = labels[row, at]
    answer = labels.new_full((len(x), int(column.max()) + 2), pad)
    answer[:, 0] = start
    answer[row, column + 1] = targets
    # the last column is a target only: nothing is predicted from it
    return Split(x[:, :S], is_prompt[:, :S], answer[:, :-1], (row, column), targets)
