"""Evaluate models: generate samples, measure them, and write a page."""
