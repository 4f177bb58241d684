"""Forward passes on a device."""
