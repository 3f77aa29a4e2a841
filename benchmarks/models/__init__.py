"""Real models and real texts, sounds and pictures to prove conversions on, taken from packages by name."""
