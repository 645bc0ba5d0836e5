"""The definition of every codec in plain PyTorch: the CPU path, and what the Triton kernels are tested against."""
