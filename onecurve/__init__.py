"""Fine-tune pretrained transformers: one recipe, one loss curve, any machine."""
