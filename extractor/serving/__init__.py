"""Embed images that arrive one call at a time, from many threads."""
