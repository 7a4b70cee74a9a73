"""Calls of the operating system that Python has no function for."""
