"""Checks of the installation, the machine and an output folder, whatever is broken there."""
