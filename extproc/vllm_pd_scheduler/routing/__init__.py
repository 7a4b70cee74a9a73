"""The way of one request through the fleet."""
