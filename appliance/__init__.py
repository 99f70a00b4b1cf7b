"""The appliance: engine, cache and server."""

__version__ = "0.1.0"
