"""Fused operations: each folder holds a contract, its torch reference and its kernels."""
