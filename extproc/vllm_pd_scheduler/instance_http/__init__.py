"""What all who speak HTTP with instances have in common."""
