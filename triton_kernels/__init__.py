"""Triton kernels for LoRA and DoRA linears: one file per op, launchers on plain tensors; torch and triton only."""
