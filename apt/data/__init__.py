"""Captioned videos and images: folders, the built-in digits, and the loader for training."""

from __future__ import annotations
