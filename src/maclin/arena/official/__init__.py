"""Published data in its official layout, read from a directory of the user's."""
