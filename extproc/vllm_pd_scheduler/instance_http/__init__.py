"""HTTP with instances: a lean client for requests, and what it has in common with the others that ask them."""
