"""Triton kernels, for GPUs. Each has a plain PyTorch reference that its tests compare with."""
