"""Evaluation: predictions (files) to metrics with intervals. Loads no model."""
