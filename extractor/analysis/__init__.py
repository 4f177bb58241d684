"""What a store looks like: duplicates, outliers and maps."""
