"""The books that are shipped: gaussian.npz, and make.py, which found them."""
