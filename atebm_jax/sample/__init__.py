"""Samples of a trained model, the same whatever the batch and the devices."""
