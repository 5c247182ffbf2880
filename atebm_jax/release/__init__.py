"""Trained models for others: a folder in the layout of model hubs."""
