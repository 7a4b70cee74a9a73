"""What is predicted of the fleet: times, lengths and cached prefixes."""
