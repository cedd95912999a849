"""The base model with delta-aware layers and paged attention. Knows rows and slots; no queues, no HTTP."""
