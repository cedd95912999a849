"""K2: y[rows of a slot] += x[rows of that slot] · Termᵀ for codes under a mask."""
