"""Helpers that every package uses: errors, files, logging, memory, metadata, text."""
