"""What carries the replicas' messages: the loop that sends and receives them, and its back ends."""
