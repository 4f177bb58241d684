"""What the bytes of an image file say: its format, and where its picture is."""
