"""Pictures of the report, each with a description in words and a table of its numbers."""
