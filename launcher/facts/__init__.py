"""Facts about this machine, a model, data files and a run directory."""
