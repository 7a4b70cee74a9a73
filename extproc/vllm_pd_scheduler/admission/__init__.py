"""Who is served next: the queue of requests that wait, and the memory that bodies may take."""
