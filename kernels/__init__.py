"""kernels/: the operations that decide speed and memory, each beside its PyTorch specification.

The models call these functions and nothing else; what runs is decided by the tensors' device.
On CUDA it is the Triton kernel; elsewhere the specification, or PyTorch's own fused operation where
a file says so (launch.py).

  launch         when a kernel runs
  attention      softmax(q kᵀ / √D) v for any mask predicate, forward and backward
  decode         one query against a cache of keys and values
  cached         which of the two a decoder's layer calls
  biased         attention with a number added to every score: T5's
  quantize       one row times a matrix: weights laid out for reading, or in int8 or int4
  norm           RMSNorm and LayerNorm
  rope           rotary positions, half-split
  swiglu         SwiGLU, QuickGELU, GELU
  cross_entropy  output head and loss over supervised rows only
  checkpoint     what a block keeps for its backward pass, and what it computes again
  offload        what is kept waits in the host's memory
  host_state     what an optimizer remembers waits there, too
  adamw          one fused pass: bf16 weights with an exact fp32 master, 8-bit moments

Beside the operations: spans (where the Q-Former's masks are True), gather (the batch of all ranks).
Timed by python -m bench.
"""

import warnings

from kernels.attention import causal, full, sliding_window
from kernels.biased import biased_attention, distance_bias, hide_padding
from kernels.cached import attention, mask_rule, self_attention
from kernels.checkpoint import checkpointed, keep_output, recompute
from kernels.cross_entropy import linear_cross_entropy
from kernels.decode import decode
from kernels.launch import fused
from kernels.norm import layer_norm, rms_norm
from kernels.rope import rope, rope_table
from kernels.swiglu import gelu, quick_gelu, swiglu

# `python -m kernels.norm` finds norm already imported from here: Python would warn of that
warnings.filterwarnings("ignore", "'kernels.* found in sys.modules", RuntimeWarning)

# checkpoint.py must know them: they are quicker to run again than to keep
layer_norm, rms_norm, gelu, quick_gelu, swiglu = map(
    recompute, (layer_norm, rms_norm, gelu, quick_gelu, swiglu))

__all__ = ["attention", "biased_attention", "causal", "checkpointed", "decode", "distance_bias",
           "full", "fused", "gelu", "hide_padding", "keep_output", "layer_norm",
           "linear_cross_entropy", "mask_rule", "quick_gelu", "recompute", "rms_norm", "rope",
           "rope_table", "self_attention", "sliding_window", "swiglu"]
