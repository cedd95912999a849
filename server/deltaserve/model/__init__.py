"""The base model with delta-aware layers and paged attention. Knows rows, slots and names of weights; no queues, no HTTP."""
