"""The notebooks: running, checking, and the editions for students."""
