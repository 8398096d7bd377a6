"""Onecurve against the tutorial's three ways: the native loop, transformers.Trainer, Keras."""
