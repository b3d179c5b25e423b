"""Evaluate trained digits models and write their results page."""

from __future__ import annotations

from apt.evaluate.digits.classifier import ClassifierConfig, load_classifier
from apt.evaluate.digits.config import EvaluateConfig
from apt.evaluate.digits.evaluation import evaluate_digits

__all__ = ["ClassifierConfig", "EvaluateConfig", "evaluate_digits", "load_classifier"]
