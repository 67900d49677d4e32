"""The whole way on one machine without GPU, network or token: `make demo`."""
