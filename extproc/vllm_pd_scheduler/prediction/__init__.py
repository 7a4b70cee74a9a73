"""Predictions: how long prefills and decode steps take, how long answers are, which prefixes are cached."""
