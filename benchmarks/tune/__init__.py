"""Tuning tables for the card at hand: ``python -m benchmarks.tune``."""
