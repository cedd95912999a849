"""K1: y[rows of a slot] += x[rows of that slot] · Termᵀ for dense codes and low-rank factors."""
