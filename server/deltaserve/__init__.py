"""deltaserve: many full fine-tunes served from one resident base model."""

__version__ = "0.1.0"
