"""`auto`: which merge is best, found on rows that the result is not judged by."""
