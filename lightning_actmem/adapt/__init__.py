"""Bits that adapt: what rounding adds to the gradient's variance, measured, and the bits that follow from it."""
