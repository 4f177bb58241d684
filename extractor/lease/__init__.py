"""Shards computed by workers: in this process, in several, on other machines."""
