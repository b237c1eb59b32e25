"""Limits of what is read of a checkpoint; sizes are checked before anything is parsed."""

MAX_HEADER_BYTES = 10_000_000  # the largest real models have headers of 1 to 2 MB
MAX_TENSORS = 100_000
MAX_RANK = 8  # axes of a tensor; the largest real one has 6
MAX_SIZE = 2**63 - 1  # largest length of an axis, and offset, that readers of the format can hold
MAX_NAME = 500  # characters of a tensor's name; the longest real ones have 150
MAX_DEPTH = 32  # lists and objects within each other; the deepest real ones, pipelines of tokenizers, have 10
MAX_DIGITS = 100  # digits of a number in JSON; the longest real one, model_max_length, has 31
MAX_KEYS = 300_000  # keys of all objects in a configuration: 100,000 labels by id and by name, and some more
MAX_KEY = 1000  # characters of a configuration's key; names of labels are keys too
MAX_CONFIG_BYTES = 5_000_000
MAX_TOKENIZER_BYTES = 50_000_000  # the largest real ones have 35 MB
MAX_MODULE_BYTES = 1_000_000_000  # weights of a sentence-transformers module; the largest real ones have 50 MB
MAX_TEMPLATE_BYTES = 1_000_000  # the largest real ones have 30 kB
MAX_DESCRIPTION_BYTES = 80_000_000  # all files beside the weights together
MAX_DESCRIPTION_FILES = 200
MAX_WEIGHT_FILES = 1000
MAX_LABELS = 100_000  # labels that get names: a header may claim any number
