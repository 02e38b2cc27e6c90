"""The only code that meets the network and archive bytes; each locks itself in before its first hostile byte."""
