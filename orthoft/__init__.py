"""orthoft."""
