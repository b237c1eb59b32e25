"""StarCoder 2 (Lozhkov et al. 2024, arXiv 2402.19173): grouped queries and a feed-forward layer without a gate."""

from dataclasses import replace

from worker.engine.catalog.families.head import Head
from worker.engine.catalog.families.llama import LLAMA
from worker.engine.catalog.families.table import Kind

STARCODER2 = replace(
    LLAMA,
    model_type="starcoder2",
    head=Head("Starcoder2ForSequenceClassification", ("score",)),
    layer_modules={
        **{name: kind for name, kind in LLAMA.layer_modules.items() if not name.startswith("mlp.")},
        "mlp.c_fc": Kind.UP,
        "mlp.c_proj": Kind.DOWN,
    },
    config_names={key: name for key, name in LLAMA.config_names.items() if key != "head_size"},
    absent_sizes={"kv_heads": 2},
    settings={
        "vocab_size": 49152,
        "hidden_act": "gelu_pytorch_tanh",
        "norm_epsilon": 1e-5,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "use_bias": True,
        "sliding_window": None,
    },
    neuron_vectors=4,
)
