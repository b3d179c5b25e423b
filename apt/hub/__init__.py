"""The Hub: models downloaded, pulled whole, and pushed with a card."""
