"""The command line: one file per command; each parses, calls a library function and prints."""
