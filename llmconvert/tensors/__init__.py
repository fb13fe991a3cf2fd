"""Tensors as expressions over stored tensors, and their evaluation by row blocks."""
