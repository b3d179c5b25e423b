"""The command line, one file per command. Each parses options, calls the library and prints."""
