"""Triton versions of the kernels next door, one file each, imported on first use; see `prune.kernels.dispatch`."""
