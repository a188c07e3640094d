"""Formats on disk: how codes and scales are written to files that other programs read."""
