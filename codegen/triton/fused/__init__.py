"""Kernels written from groups of IR ops: which ops one kernel takes, its Triton source, its declaration."""
