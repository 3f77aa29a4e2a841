"""Mechanisms made of mechanism instances."""
