"""Harnesses that feed mutated input to the parsers; see __main__.py."""
