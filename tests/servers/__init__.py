"""Servers that the tests and the demo start on loopback and take down again."""
