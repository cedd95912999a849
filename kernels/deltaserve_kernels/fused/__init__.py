"""Deltas on a GPU: one block of memory each, read by Triton kernels that mix tenants, codecs and widths in a launch."""
