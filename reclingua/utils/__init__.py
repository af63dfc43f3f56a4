"""What every room uses: errors, files, logging, memory, metadata, text."""
