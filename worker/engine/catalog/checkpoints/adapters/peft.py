"""Rules of PEFT: how it names what it saves, and what keys of its configuration mean."""

import re

PREFIX = "base_model.model."  # prefix of the name of every tensor that PEFT saves
WRAPPERS = re.compile(r"\.(base_layer|modules_to_save)(?=\.)")
"""Parts of names that tensors stored whole have in an adapter but not in the base."""
FACTORS = {
    "lora_A.weight": ("a", False),
    "lora_B.weight": ("b", False),
    "lora_embedding_A": ("a", True),
    "lora_embedding_B": ("b", True),
}
"""Ends of names, each with its factor, and whether that adapts an embedding."""
PLAIN_STARTS = ("gaussian", "eva", "orthogonal")
"""Kinds of `init_lora_weights` that leave the base's weights as they are; others move a part of them into the adapter,
whose base is then another."""
HARMLESS = {
    "auto_mapping", "bias", "corda_config", "ensure_weight_tying", "eva_config", "fan_in_fan_out", "inference_mode",
    "loftq_config", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config",
}  # fmt: skip
"""Keys of `adapter_config.json` that describe the training, or that the tensors show too. PEFT itself corrects
`fan_in_fan_out` for each layer by the layer's kind."""
TASK_CLASSES = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
"""Ends of the names of the classes that PEFT trains for each task."""
EMBEDDING = re.compile(
    r"shared|wte|wpe|embeddings|(word|token|token_type|tok|position|rel|lang)_embeddings?"
    r"|embed_(tokens|in|positions)|(tokens|positions)_embed|relative_attention_bias"
)
"""Last parts of names of modules that are embeddings, not linear layers."""
MAY_BE_EMBEDDING = re.compile(r"emb|token|posi|shared|wte|wpe|relative_attention_bias|\Aw\Z")
"""Parts of names of modules that may be embeddings."""
ALL_LINEAR = "all-linear"
WHOLE_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Modules that PEFT stores whole for each task, whatever `modules_to_save` says."""
HEAD_MODULES = {name for names in WHOLE_HEADS.values() for name in names}
ANY_LAYERS = r".*?\.[^.]*"
"""Pattern that PEFT matches before a layer's number if there is no `layers_pattern`."""
MERGE_IT = "merge it into its base with PEFT (merge_and_unload) and name the result"
"""Advice on what only PEFT can do."""
