"""Codecs: Δ ↔ terms of the algebra. Pure mathematics on one matrix; no files, slots, tenants or other codecs."""
