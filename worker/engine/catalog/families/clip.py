"""CLIP's vision tower (Radford et al. 2021, arXiv 2103.00020) for image classification."""

from worker.engine.catalog.families.head import Head
from worker.engine.catalog.families.table import Family, Kind, Norms

CLIP = Family(
    model_type="clip",
    head=Head("CLIPForImageClassification", ("classifier",)),  # it reads the mean over all patches
    prefix="vision_model.",
    embeddings="vision_model.embeddings",
    layers="encoder.layers.{layer}",
    layer_modules={
        "layer_norm1": Kind.ATTENTION_NORM,
        "self_attn.q_proj": Kind.QUERY,
        "self_attn.k_proj": Kind.KEY,
        "self_attn.v_proj": Kind.VALUE,
        "self_attn.out_proj": Kind.ATTENTION_OUTPUT,
        "layer_norm2": Kind.FEED_FORWARD_NORM,
        "mlp.fc1": Kind.UP,
        "mlp.fc2": Kind.DOWN,
    },
    outer_modules={
        "embeddings.patch_embedding": Kind.EMBEDDING,
        "embeddings.position_embedding": Kind.EMBEDDING,
        "pre_layrnorm": Kind.EMBEDDING,
        "post_layernorm": Kind.FINAL_NORM,  # of the first token, which this head does not read
    },
    outer_parameters={"embeddings.class_embedding": Kind.EMBEDDING},
    unread=("embeddings.position_ids",),
    part_of={"clip_vision_model": "vision_config"},
    older_prefix="vision_model.vision_model.",
    config_names={
        "layers": "vision_config.num_hidden_layers",
        "heads": "vision_config.num_attention_heads",
        "neurons": "vision_config.intermediate_size",
        "hidden": "vision_config.hidden_size",
        "image": "vision_config.image_size",
        "patch": "vision_config.patch_size",
    },
    settings={
        "vision_config.hidden_act": "quick_gelu",
        "vision_config.layer_norm_eps": 1e-5,
        "vision_config.num_channels": 3,
    },
    supported={},
    norms=Norms.BEFORE_BLOCKS,
)
