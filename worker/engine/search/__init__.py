"""`auto` finds the best merge, on rows on which the result is not judged."""
