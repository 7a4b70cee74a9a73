"""One request as the client sent it: headers, body, prompt, and the errors that answer it."""
