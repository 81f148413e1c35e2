"""Samples for Stage 1, and the prompt embeddings that ship with the project."""
