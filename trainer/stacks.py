"""What a forecast needs to know of a language model's layers: LLaMA and OPT have one stack of
them, a T5 two, of which each reads a part of the tokens."""

from typing import NamedTuple

from torch import nn


class Stack(NamedTuple):
    """Layers of one kind. Numbers are of a token and a layer."""
    blocks: nn.ModuleList
    depth: int
    own: int                        # what self-attention puts out, H D
    kept: int                       # of matmul outputs that wait for the backward of frozen layers
    mlp: int                        # what stands between the MLP's activation and its last product
    share: str                      # of the tokens: "all", "prompt" or "answer"
    causal: bool                    # half of the scores are computed

    def tokens(self, tokens, learned):
        """How many of a sample's tokens it reads; learned: those with loss."""
        return {"all": tokens, "prompt": tokens - learned, "answer": learned}[self.share]


def stacks(llm):
    """[Stack] of a language model."""
    c = llm.config
    own = c.heads * c.head_dim
    keys = 2 * c.kv_heads * c.head_dim
    lora = sum(p.shape[0] for n, p in llm.blocks[0].named_parameters() if n.endswith(".a"))
    gated = own + keys + 2 * c.mlp + lora
    if llm.kind == "opt":           # ReLU keeps what it puts out, and no gate
        return [Stack(llm.blocks, c.depth, own, own + keys + c.mlp, 0, "all", True)]
    if llm.kind == "t5":
        # cross-attention: a query more, and keys and values of the prompt, counted as the answer's
        return [Stack(llm.encoder, c.encoder_depth, own, gated, c.mlp, "prompt", False),
                Stack(llm.decoder, c.depth, 2 * own, gated + own + keys, c.mlp, "answer", True)]
    return [Stack(llm.blocks, c.depth, own, gated, c.mlp, "all", True)]


def cross_flops(stack, prompt, answer):
    """FLOPs of a sample in the scores and sums of a decoder's cross-attention."""
    first = stack.blocks[0]
    if not hasattr(first, "cross_q"):
        return 0
    return 4 * prompt * answer * first.cross_q.weight.shape[0] * stack.depth


def cross_weights(stack):
    """The matrices of a decoder that read the prompt's tokens and not the answer's."""
    found = [block.cross_kv for block in stack.blocks if hasattr(block, "cross_kv")]
    return nn.ModuleList(found)


def last_products(stack):
    """The last product of every layer's MLP: no policy of --checkpoint computes it again."""
    found = [getattr(block, "mlp", block).down for block in stack.blocks]
    return nn.ModuleList(found)
