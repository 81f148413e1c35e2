"""Measures the stages and the pipeline, beside baselines."""
