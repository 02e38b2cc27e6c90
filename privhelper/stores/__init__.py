"""The two stores of layers: one interface (base.py), `thin` for device-mapper, `reflink` for hosts without it."""
