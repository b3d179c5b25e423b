"""The command line, one file per command: they parse, call the library and print."""
