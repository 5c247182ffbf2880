"""Protocols that turn a model and data into figures, pictures and a report."""
