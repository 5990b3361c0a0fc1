"""Restoring photos from files to files."""
