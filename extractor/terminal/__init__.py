"""What the command reads and writes: flags, environment, messages, signals."""
