"""formats/unused.py: which tensors of a weight file are not loaded, and why.

A table is {pattern of the file's names: reason}. Some reasons speak of the values ("tied: the word
embeddings once more", "positions 0, 1, 2 ..."). Such a reason is a `Claim`:
`checkpoints.load_into` checks it, and a tensor that holds something else is refused by name. A
reason that says what a tensor is for ("the half of CLIP that reads text") needs no check and is a
plain str. A tensor without a reason is an error.
"""

import re

import torch

from formats.errors import BadModel
from kernels.rope import rope_table


class Claim(str):
    """A reason that `holds(tensor, weights)` checks; otherwise a str like any other."""

    def __new__(cls, reason, holds):
        claim = super().__new__(cls, reason)
        claim.holds = holds
        return claim

    def check(self, name, weights):
        """Raises BadModel where the tensor is not what the reason says."""
        if not self.holds(weights[name], weights):
            raise BadModel(f"tensor {name} is left unused as {self}, and is not that: file and "
                           "config.json do not fit together; take both from one place")


def counts_up(tensor, weights):
    """Is it 0, 1, 2 ... in its own dtype? Half precision rounds those above 256 or 2048."""
    return torch.equal(tensor.flatten(), torch.arange(tensor.numel()).to(tensor.dtype))


def same_as(other):
    """A check: is this tensor the tensor `other` of the same file? If that is absent: no."""
    def holds(tensor, weights):
        if other not in weights or weights[other].shape != tensor.shape:
            return False
        return bool((weights[other] == tensor).all())
    return holds


def head_is_embedding(weights, embed, head) -> bool:
    """May the head of a file that config.json calls tied be left out? embed, head: their names in
    the file. Not if the file has both and they differ: then the head is one of its own, whatever
    config.json says (transformers 5)."""
    if embed not in weights or head not in weights:
        return True
    return same_as(embed)(weights[head], weights)


def tied_decoder(at, words, bias):
    """A decoder `at` that is the tensors `words` and `bias` once more."""
    return {rf"{at}\.weight": Claim("tied: the word embeddings once more", same_as(words)),
            rf"{at}\.bias": Claim("tied: the bias once more", same_as(bias))}


# ------------------------------------------------------------------------------------ the tables

POSITIONS = {r".*position_ids": Claim("a buffer of old files: 0, 1, 2 ...", counts_up)}
VISION = {**POSITIONS, r"(text_model\.|text_projection|visual_projection|logit_scale).*":
          "the half of CLIP that reads text"}
TIED = "tied: the embedding once more, see head_is_embedding"
QFORMER = {**POSITIONS, r"Qformer\.cls\..*": "the head of the captions; Blip2Stage1 has it",
           r"(?!Qformer\.|qformer\.|embeddings\.|query_tokens).*": "not of the Q-Former"}
QFORMER_TEXT = {r".*encoder\.layer\.\d+\.(intermediate|output)\..*|.*(word|position)_emb.*":
                "the text branch, which is not used in front of a language model"}
STAGE1 = {**POSITIONS, **tied_decoder(
    r"Qformer\.cls\.predictions\.decoder", "Qformer.bert.embeddings.word_embeddings.weight",
    "Qformer.cls.predictions.bias")}


def beside_tower(prefix):
    """What stands beside a vision tower under this prefix in a file of BLIP-2."""
    return {rf"(?!{re.escape(prefix)}).*": "not of the tower",
            r"vision_model\.post_layernorm\..*": "ln_vision, which is not frozen with the tower "
            "and has a place of its own before the Q-Former"}


def llama(config):
    """For a LLaMA: a buffer inv_freq must hold the frequencies that config.json asks for, scaled or
    (as files from before 2023-12 have it) not, within the rounding of the file's numbers."""
    tables = []
    for scaling in (config.rope_scaling, None):
        cos, sin = rope_table(torch.ones(1), config.head_dim, config.rope_theta, scaling)
        tables.append(torch.atan2(sin, cos)[0])         # the angles of position 1: (D/2)

    def holds(tensor, weights):
        rtol = 4 * torch.finfo(tensor.dtype).eps
        for table in tables:
            if tensor.shape == table.shape and torch.allclose(tensor.float(), table, rtol, 1e-7):
                return True
        return False
    return {r".*rotary_emb\.inv_freq": Claim("recomputed from rope_theta", holds)}


def qformer(text):
    """For a Q-Former; text=False: its text branch is left out."""
    return QFORMER if text else {**QFORMER, **QFORMER_TEXT}


def bert(prefix):
    """For a BERT whose names begin with `prefix`."""
    return {
        **POSITIONS,
        r".*token_type_embeddings\..*": "first or second sentence: a Q-Former has one text",
        r".*pooler\..*|cls\.seq_relationship\..*": "the task of which sentence follows",
        **tied_decoder(r"cls\.predictions\.decoder", f"{prefix}embeddings.word_embeddings.weight",
                       "cls.predictions.bias")}
