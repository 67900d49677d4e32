"""Make the model that is trained from a base: load, calibrate, adapt, compensate and cut it."""
