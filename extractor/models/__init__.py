"""A model name to a ``Backbone``."""
