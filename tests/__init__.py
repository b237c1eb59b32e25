"""What must be in the environment before torch and transformers are imported anywhere."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
# Tiny models on many threads spend their time waiting for each other; the service sets a number of its own.
os.environ.setdefault("OMP_NUM_THREADS", "1")
