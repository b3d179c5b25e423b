"""Evaluation by a command: models in; samples, figures and a page out."""
