"""Captioned videos and images: folders, the built-in digits, and the loader that feeds training."""

from __future__ import annotations
