"""The machine: cores, devices, process settings, timing."""
