"""What the scheduler asks of the operating system."""
