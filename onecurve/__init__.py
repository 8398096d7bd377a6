"""Fine-tune pretrained transformers: one recipe, one loss curve, any machine."""

__version__ = "0.1.0"
