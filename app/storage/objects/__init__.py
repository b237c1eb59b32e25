"""Object storage (S3 and what speaks its protocol): reading, writing, and copies of objects on this machine."""
