"""Judging deltas: how much of a fine-tune a delta keeps, on its task and off it, and which codec keeps most."""
