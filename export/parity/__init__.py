"""The parity gate: the exported model computes what the trained one computes."""
