"""Packed-delta arithmetic: the packed forms and the operations on them.

Knows tensors, bits and segments. Does not know codecs, artifacts, tenants or HTTP. Importing it needs torch alone.
"""
