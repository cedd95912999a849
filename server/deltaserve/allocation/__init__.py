"""One budget of bytes shared out among layers: pure mathematics on a table of costs and losses."""
