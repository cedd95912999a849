"""Load on an engine in this process or on a server somewhere, and what each tenant got of it."""
