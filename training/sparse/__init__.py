"""Zeros in the weights where other methods cut: masks, compensation, allocation, and the walk over the layers."""
