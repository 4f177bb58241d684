"""Maintain a finished store: check every byte, and rewrite it without retired rows."""
