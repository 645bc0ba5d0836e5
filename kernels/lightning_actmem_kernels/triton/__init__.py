"""The codecs as Triton kernels, bit-equal to the reference; import this package only where Triton is installed.

integer and identity are not here: each is one dtype cast or copy, which PyTorch already runs as one kernel.
"""
