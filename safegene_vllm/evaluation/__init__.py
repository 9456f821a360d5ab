"""Evaluation of models with and without a safety vector: generate, judge, count."""
