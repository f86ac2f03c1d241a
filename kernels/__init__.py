"""kernels/: the operations that decide speed and memory, each beside its PyTorch specification.

The models call these functions and nothing else; what runs is decided by the tensors' device.
So far every device runs the specification, or PyTorch's own fused operation where a file says so.

  attention      softmax(q kᵀ / √D) v for any mask predicate
  norm           RMSNorm and LayerNorm
  rope           rotary positions, half-split
  swiglu         SwiGLU, QuickGELU
  cross_entropy  output head and loss over supervised rows only
"""

from kernels.attention import attention, causal, full
from kernels.cross_entropy import linear_cross_entropy
from kernels.norm import layer_norm, rms_norm
from kernels.rope import rope, rope_table
from kernels.swiglu import quick_gelu, swiglu

__all__ = ["attention", "causal", "full", "linear_cross_entropy", "layer_norm", "rms_norm", "rope",
           "rope_table", "quick_gelu", "swiglu"]
