"""The project on a real kernel: a virtual machine with device-mapper and systemd, and the tests that run in it."""
