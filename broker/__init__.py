"""Runs as you: makes policy, supervises the two unprivileged programs, sees no archive byte and holds no privilege."""
