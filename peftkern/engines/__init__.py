"""What runs a formula: `torch` composes torch's own ops, on any device. Kernels are in csrc/ and ops/*_triton.py."""
