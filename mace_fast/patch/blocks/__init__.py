"""One fast module for each block that is replaced."""
