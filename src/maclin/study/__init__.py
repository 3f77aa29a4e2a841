"""The papers' own experiments, on data that is at hand: each a job with settings, and a record of what it found."""
