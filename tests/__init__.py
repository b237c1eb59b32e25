"""What must be in the environment before torch and transformers are imported anywhere."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
# Tiny models on several threads spend their time waiting for each other: ten times what the work takes where something
# else runs too. The second is for the engines of the services that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MASKMERGE_THREADS", "1")
