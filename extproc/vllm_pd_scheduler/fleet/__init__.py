"""The instances: which there are, how they are, what is in flight on them."""
