"""From a base to the model that is trained: loaded, adapted, calibrated, compensated and cut."""
