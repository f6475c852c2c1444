"""Measurements: what a model does here, and what this machine would allow."""
