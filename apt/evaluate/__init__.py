"""Evaluation by a command: trained models in, a results page out."""

from __future__ import annotations

from apt.evaluate.config import EvaluateConfig
from apt.evaluate.digits import evaluate_digits
from apt.evaluate.digits_classifier import ClassifierConfig, load_classifier

__all__ = ["ClassifierConfig", "EvaluateConfig", "evaluate_digits", "load_classifier"]
