"""Fused ops: one op a file, each an autograd Function with Triton kernels and a reference path.

The ops know torch and Triton, never transformers, PEFT or wrapt. Nothing is imported here, so that an op loads only
what it needs.
"""
