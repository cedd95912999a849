"""Attention of one query a sequence over keys and values that lie in blocks."""
