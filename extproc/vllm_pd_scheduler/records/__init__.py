"""What is remembered of the past, bounded, for those who look at it later."""
