"""The command line: one module per subcommand, torch imported when a command runs."""
