"""The command ``extract``: parsing, output, progress and exit codes."""
