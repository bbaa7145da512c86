"""The command line: one module a subcommand, torch imported when a command runs."""
