"""ViT (Dosovitskiy et al. 2021, arXiv 2010.11929) for image classification."""

from worker.engine.catalog.families.head import Head
from worker.engine.catalog.families.table import Family, Kind, Norms

VIT = Family(
    model_type="vit",
    head=Head("ViTForImageClassification", ("classifier",), reads_first_token=True),
    prefix="vit.",
    embeddings="vit.embeddings",
    layers="layers.{layer}",
    layer_modules={
        "layernorm_before": Kind.ATTENTION_NORM,
        "attention.q_proj": Kind.QUERY,
        "attention.k_proj": Kind.KEY,
        "attention.v_proj": Kind.VALUE,
        "attention.o_proj": Kind.ATTENTION_OUTPUT,
        "layernorm_after": Kind.FEED_FORWARD_NORM,
        "mlp.fc1": Kind.UP,
        "mlp.fc2": Kind.DOWN,
    },
    stored_layers="encoder.layer.{layer}",
    stored_modules={
        "attention.q_proj": "attention.attention.query",
        "attention.k_proj": "attention.attention.key",
        "attention.v_proj": "attention.attention.value",
        "attention.o_proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    },
    outer_modules={"embeddings.patch_embeddings.projection": Kind.EMBEDDING, "layernorm": Kind.FINAL_NORM},
    outer_parameters={"embeddings.cls_token": Kind.EMBEDDING, "embeddings.position_embeddings": Kind.EMBEDDING},
    unread=("embeddings.mask_token", "pooler.dense.weight", "pooler.dense.bias"),
    config_names={
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "neurons": "intermediate_size",
        "hidden": "hidden_size",
        "image": "image_size",
        "patch": "patch_size",
    },
    settings={"hidden_act": "gelu", "layer_norm_eps": 1e-12, "num_channels": 3},
    supported={},
    norms=Norms.BEFORE_BLOCKS,
)
