"""One module for each format of adapters' files."""
