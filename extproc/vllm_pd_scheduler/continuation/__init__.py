"""Streams that go on at another decode instance when theirs dies."""
