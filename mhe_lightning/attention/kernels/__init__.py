"""Attention kernels that torch has not: each is an operator with a plain-torch form and, for GPUs, a Triton form."""
