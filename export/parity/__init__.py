"""The parity gate, which proves that the exported model computes what the trained one computes."""
