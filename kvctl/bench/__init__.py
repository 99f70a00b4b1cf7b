"""Benches of an appliance on this box, each against its own throw-away home."""
