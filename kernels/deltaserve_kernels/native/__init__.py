"""Kernels in C for x86-64 with AMX, AVX-512 or AVX2: packed terms, the base's linear layers, and what a decoder needs
beside them. See README.md; `src/` has the sources, `kernels/build_native.py` builds them."""
