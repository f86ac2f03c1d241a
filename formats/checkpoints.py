"""What a weight file holds beyond the parameters: checked before it is left unused.

A tensor that is not loaded needs a reason. Some reasons say something about its values ("tied: the
embedding once more", "positions 0, 1, 2 ..."). Such a reason is a `Claim`, and `data.fill` checks
it: a file that says something else is refused by name. A reason that says what a tensor is for
("the half of CLIP that reads text") needs no check, and is a plain str."""
import torch

from formats.errors import BadModel


class Claim(str):
    """A reason that `holds(tensor, weights)` checks; elsewhere it is read as any other str."""

    def __new__(cls, reason, holds):
        claim = super().__new__(cls, reason)
        claim.holds = holds
        return claim

    def check(self, name, weights):
        """Raises BadModel where the tensor is not what the reason says."""
        if not self.holds(weights[name], weights):
            raise BadModel(f"tensor {name} is left unused as {self}, and is not that: file and "
                           "config.json do not fit together; take both from one place")
        release(weights, name)


def release(weights, *names):
    """Hand back the memory of tensors that were only looked at."""
    for name in names:
        getattr(weights, "release", lambda name: None)(name)


def _counts_up(tensor, weights):
    """0, 1, 2 ... in the tensor's own numbers: half precision rounds those above 256 or 2048."""
    return torch.equal(tensor.flatten(), torch.arange(tensor.numel()).to(tensor.dtype))


POSITIONS = {r".*position_ids": Claim("a buffer of old files: 0, 1, 2 ...", _counts_up)}


def same_as(other):
    """A check: is this tensor the tensor `other` of the same file? Absent there: it is not."""
    def holds(tensor, weights):
        if other not in weights or weights[other].shape != tensor.shape:
            return False
        equal = bool((weights[other] == tensor).all())
        release(weights, other)
        return equal
    return holds


def tied_decoder(at, words, bias):
    """{pattern: reason} of a decoder `at` that is the tensors `words` and `bias` once more."""
    return {rf"{at}\.weight": Claim("tied: the word embeddings once more", same_as(words)),
            rf"{at}\.bias": Claim("tied: the bias once more", same_as(bias))}


def rotary(*tables):
    """{pattern: reason} of the buffers inv_freq: one of `tables`, the frequencies (D/2) that
    config.json asks for, within the rounding of the file's numbers."""
    def holds(tensor, weights):
        near = 4 * torch.finfo(tensor.dtype).eps
        return any(tensor.shape == table.shape
                   and torch.allclose(tensor.float(), table, rtol=near, atol=1e-7)
                   for table in tables)
    return {r".*rotary_emb\.inv_freq": Claim("recomputed from rope_theta", holds)}


def head_is_embedding(weights, embed, head) -> bool:
    """May the head of a file that config.json calls tied be left out? Not if the file has both, and
    they differ: then it is a head of its own, whatever config.json says (transformers 5)."""
    if embed not in weights or head not in weights:
        return True
    equal = same_as(embed)(weights[head], weights)
    release(weights, head)
    return equal
