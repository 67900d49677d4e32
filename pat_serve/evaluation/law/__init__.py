"""How long to recover: the law of a run's own held-out curve, and what it says of tokens not yet trained on.

fit.py    the mathematics: L(D) = A + B D^-b      curve.py  a run's held-out curve, off its metrics
report.py what the law says, as lines and as JSON
"""
