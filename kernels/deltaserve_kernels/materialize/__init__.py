"""K3: W + Δ of one delta and layer, written out for runs so long that a dense product is cheaper than packed codes."""
