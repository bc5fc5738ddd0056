"""``<op>_ref`` in plain PyTorch: oracle of the tests, path of the ops on a CPU, baseline of the benchmarks.

Each file holds the differentiable reference and, written out, the backward formula that the op's autograd Function
uses. Float64 input is computed in float64, so that the same code serves as the oracle.
"""

from .rms_norm import rms_norm_bwd_ref, rms_norm_fwd_ref, rms_norm_ref
from .rope import rope_bwd_ref, rope_ref
from .swiglu import swiglu_bwd_ref, swiglu_ref

__all__ = [
    "rms_norm_bwd_ref",
    "rms_norm_fwd_ref",
    "rms_norm_ref",
    "rope_bwd_ref",
    "rope_ref",
    "swiglu_bwd_ref",
    "swiglu_ref",
]
