"""Leased shards computed: in this process, in several, on a cluster."""
