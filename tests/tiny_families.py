"""Every family at tiny size: its configuration, its tokenizer, and where its nodes are.

What a node owns is written down here a second time, on purpose: the tests compare the product's tables with it.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", *(f"w{i}" for i in range(85))]


def wordpiece() -> Any:
    """One token a word, with BERT's special tokens; segments are told apart."""
    from transformers import BertTokenizer

    return BertTokenizer(vocab=numbered("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS), model_max_length=48)


def mpnet_wordpiece() -> Any:
    from transformers import MPNetTokenizer

    return MPNetTokenizer(vocab=numbered("<s>", "<pad>", "</s>", "[UNK]", "<mask>", *WORDS))


def byte_level_bpe() -> Any:
    """Trained on the words: common ones are one token, others several."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import RobertaTokenizer

    trained = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained.train_from_iterator([" ".join(WORDS)] * 3, vocab_size=330, special_tokens=special, show_progress=False)
    model = json.loads(trained.to_str())["model"]
    return RobertaTokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])


def xlm_roberta_unigram() -> Any:
    from transformers import XLMRobertaTokenizer

    return XLMRobertaTokenizer(vocab=unigram("<s>", "<pad>", "</s>", "<unk>", "<mask>"))


def camembert_unigram() -> Any:
    from transformers import CamembertTokenizer

    fairseq = ("<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>NOTUSED")
    return CamembertTokenizer(vocab=unigram(*fairseq, "<s>", "</s>", "<mask>"))


def deberta_unigram() -> Any:
    from transformers import DebertaV2Tokenizer

    return DebertaV2Tokenizer(vocab=unigram("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"))


def image_processor(name: str, **settings: Any) -> Callable[[], Any]:
    def made() -> Any:
        import transformers

        return getattr(transformers, name)(**settings)

    return made


def words_of_decoders() -> Any:
    """One token a word, after a mark that begins each row."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(numbered("<s>", "</s>", "<unk>", "<pad>", *WORDS), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    marks = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks)


def bytes_of_decoders() -> Any:
    """Trained on the words: common ones are one token with their space, others several; no mark begins a row."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    special = ["<s>", "</s>", "<pad>"]
    trained.train_from_iterator([" ".join(WORDS)] * 3, vocab_size=330, special_tokens=special, show_progress=False)
    marks = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, **marks)


def qwen_byte_level_bpe() -> Any:
    """Trained on the words, each after a space too; transformers takes no other class for Qwen2."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import Qwen2Tokenizer

    trained = ByteLevelBPETokenizer()
    texts = [" ".join(WORDS), " ".join(reversed(WORDS))] * 3
    trained.train_from_iterator(texts, vocab_size=600, special_tokens=["<|endoftext|>"], show_progress=False)
    model = json.loads(trained.to_str())["model"]
    return Qwen2Tokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])


def modernbert_byte_level_bpe() -> Any:
    """Trained on the words, with BERT's special tokens around a row; segments are not told apart."""
    from tokenizers import ByteLevelBPETokenizer, processors
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trained.train_from_iterator([" ".join(WORDS)] * 3, vocab_size=330, special_tokens=special, show_progress=False)
    tokenizer = trained._tokenizer
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    marks = {f"{name[1:-1].lower()}_token": name for name in special}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks)


def albert_unigram() -> Any:
    from transformers import AlbertTokenizer

    return AlbertTokenizer(vocab=unigram("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"))


def bart_byte_level_bpe() -> Any:
    from transformers import BartTokenizer

    trained = byte_level_bpe()
    model = json.loads(trained.backend_tokenizer.to_str())["model"]
    return BartTokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])


def t5_unigram() -> Any:
    from transformers import T5Tokenizer

    return T5Tokenizer(vocab=unigram("<pad>", "</s>", "<unk>"), extra_ids=0)


def numbered(*tokens: str) -> dict[str, int]:
    return {token: index for index, token in enumerate(tokens)}


def unigram(*special: str) -> list[tuple[str, float]]:
    """Whole words, and letters for the rest."""
    letters = sorted({"▁", *"".join(WORDS)})
    return [
        *((token, 0.0) for token in special),
        *((f"▁{word}", -2.0 - 0.01 * index) for index, word in enumerate(WORDS)),
        *((letter, -9.0) for letter in letters),
    ]


@dataclass(frozen=True)
class TinyFamily:
    """One kind of model. Modules are paths within a block."""

    model_type: str
    layers: str
    """Path of the list of blocks."""
    heads_in: tuple[str, ...]
    """Whose rows, and biases, belong to heads."""
    heads_out: str
    """Whose columns belong to heads: its input is their contexts."""
    neurons_in: tuple[str, ...]
    """Whose rows, and biases, belong to neurons."""
    neurons_out: str
    head: tuple[str, ...]
    """What the names of the task head's tensors begin with."""
    tokenizer: Callable[[], Any]
    values: str
    """Of `heads_in`, the one whose rows make a head's context."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    kv_heads_in: tuple[str, ...] = ()
    """Whose rows, and biases, belong to heads that several heads share."""
    kv_heads: int = 0
    """How many these are."""
    experts: int = 0
    """How many experts a layer has; modules of each are below its number in the path `mlp.experts`."""
    cross_in: tuple[str, ...] = ()
    """Whose rows, and biases, belong to heads that read the encoder's output."""
    cross_out: str = ""
    """Whose columns belong to them."""
    cross_values: str = ""
    stack: str = ""
    """Name of the stack that the blocks are, where a model has two."""
    decoder: "TinyFamily | None" = None
    """The other stack, where this one is an encoder's."""
    names_labels: bool = False
    """Whether two labels without names would be three to transformers."""
    shares_layers: bool = False
    """Whether all layers are one, which is run as many times."""
    fused: Mapping[str, str] = field(default_factory=dict)
    """Modules that hold the rows of several purposes: each slice in order, as its letter, see `Slices`, and number."""
    transposed: bool = False
    """Whether weights of layers are stored as (inputs, outputs)."""
    normed_together: bool = False
    """Whether the queries, and the keys, of all heads share a norm, by which those of one act on the others."""
    rounding: float = 0.2
    """What rounding to bfloat16 may change of its scores, in norm: without norms after the sums, so small a model with
    random weights is ill-conditioned."""
    reserved_positions: int = 0
    inner: str | None = None
    """Key of the configuration that holds the settings, in an object; None: they are the configuration's own."""
    size_names: tuple[str, str, str, str] = (
        "hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size",
    )  # fmt: skip

    def sizes(self, hidden: int, heads: int, layers: int, neurons: int) -> dict[str, int]:
        return dict(zip(self.size_names, (hidden, heads, layers, neurons), strict=True))

    def configured(self, hidden: int, heads: int, layers: int, neurons: int) -> dict[str, Any]:
        """Keys of the configuration: the sizes and the settings."""
        values = {**self.sizes(hidden, heads, layers, neurons), **self.settings}
        return {self.inner: values} if self.inner else values

    def stored(self, layers: int) -> int:
        """How many layers a checkpoint of so many has."""
        return 1 if self.shares_layers else layers

    def counts(self, heads: int, neurons: int) -> dict[str, int]:
        """How many nodes of each kind a layer has; kinds of a model with two stacks begin with the stack's name."""
        own = {"heads": heads, "neurons": neurons} | ({"kv_heads": self.kv_heads} if self.kv_heads else {})
        if self.cross_out:
            own["cross_heads"] = heads
        own = {self.kind(nodes): count for nodes, count in own.items()}
        return own | (self.decoder.counts(heads, neurons) if self.decoder else {})

    def kind(self, nodes: str) -> str:
        """The kind of node as `counts` has it."""
        return f"{self.stack}.{nodes}" if self.stack else nodes

    def score(self, kind: str, layer: int) -> str:
        """The name of a layer's scores of a kind of `counts`."""
        stack, _, nodes = kind.rpartition(".")
        return f"{stack}.layers.{layer}.{nodes}" if stack else f"layers.{layer}.{nodes}"

    def seen_at(self, kind: str) -> tuple[str, str]:
        """The path of the list of blocks, and the module within a block at whose input nodes of a kind are seen."""
        if self.decoder is not None and kind.startswith(f"{self.decoder.stack}."):
            return self.decoder.seen_at(kind)
        nodes = kind.rpartition(".")[2]
        return self.layers, {"neurons": self.neurons_out, "cross_heads": self.cross_out}.get(nodes, self.heads_out)

    def under(self, prefix: str) -> "TinyFamily":
        """The same backbone whose tensors begin otherwise: `prefix` takes the place of the first part."""
        decoder = self.decoder.under(prefix) if self.decoder else None
        return replace(self, layers=f"{prefix}{self.layers.partition('.')[2]}", decoder=decoder)

    def slices_of(self, name: str, heads: int, neurons: int) -> "Slices | None":
        """Who owns the slices of the tensor `name`; None for what no node owns."""
        if self.decoder is not None and name.startswith(f"{self.decoder.layers}."):
            return self.decoder.slices_of(name, heads, neurons)
        if not name.startswith(f"{self.layers}."):
            return None
        layer, _, inner = name.removeprefix(f"{self.layers}.").partition(".")
        module, _, part = inner.rpartition(".")
        counts = self.counts(heads, neurons)
        shared = "kv_heads" if self.kv_heads else "heads"
        kinds = {"q": "heads", "k": shared, "v": shared, "g": "neurons", "u": "neurons", "o": "heads", "d": "neurons"}
        if module in (*self.cross_in, self.cross_out):
            kinds |= dict.fromkeys("qkvo", "cross_heads")
        is_column, letter = False, ""
        if module in (self.heads_out, self.cross_out, self.neurons_out) and part == "weight":
            is_column, letter = True, "d" if module == self.neurons_out else "o"
        elif module in self.cross_in:
            letter = "v" if module == self.cross_values else "k" if module in self.cross_in[1:] else "q"
        elif module in (*self.heads_in, *self.kv_heads_in):
            letter = "v" if module == self.values else "q" if module in self.heads_in else "k"
        elif module in self.neurons_in:
            letter = "u"
        elif module not in self.fused:
            return None
        slices = self.fused[module].split() if module in self.fused else []
        slices = slices or [f"{letter}{index}" for index in range(counts[self.kind(kinds[letter])])]
        axis = int(is_column) ^ int(self.transposed and part == "weight")
        owners = tuple((self.score(self.kind(kinds[one[0]]), int(layer)), int(one[1:])) for one in slices)
        return Slices(axis, owners, tuple(one[0] for one in slices))


@dataclass(frozen=True)
class Slices:
    """Equal slices along one axis of a tensor: the score of each one's owner and its place there, and a letter for its
    purpose: query, key, value, gate, up, o for columns of the attention's output, d for those of the second projection.
    """

    axis: int
    owners: tuple[tuple[str, int], ...]
    letters: tuple[str, ...]


TINY_BERT = TinyFamily(
    model_type="bert",
    layers="bert.encoder.layer",
    heads_in=("attention.self.query", "attention.self.key", "attention.self.value"),
    values="attention.self.value",
    heads_out="attention.output.dense",
    neurons_in=("intermediate.dense",),
    neurons_out="output.dense",
    head=("classifier.",),
    tokenizer=wordpiece,
)
TINY_ROBERTA = replace(
    TINY_BERT,
    model_type="roberta",
    layers="roberta.encoder.layer",
    tokenizer=byte_level_bpe,
    settings={"type_vocab_size": 1, "layer_norm_eps": 1e-5},
    reserved_positions=2,
)
TINY_DEBERTA_V3 = replace(
    TINY_BERT,
    model_type="deberta-v2",
    layers="deberta.encoder.layer",
    heads_in=("attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj"),
    values="attention.self.value_proj",
    head=("classifier.", "pooler."),
    tokenizer=deberta_unigram,
    settings={
        "relative_attention": True,
        "position_buckets": 8,
        "pos_att_type": "p2c|c2p",
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
        "type_vocab_size": 0,
    },
)
TINY_LLAMA = TinyFamily(
    model_type="llama",
    layers="model.layers",
    heads_in=("self_attn.q_proj",),
    kv_heads_in=("self_attn.k_proj", "self_attn.v_proj"),
    kv_heads=2,
    values="self_attn.v_proj",
    heads_out="self_attn.o_proj",
    neurons_in=("mlp.gate_proj", "mlp.up_proj"),
    neurons_out="mlp.down_proj",
    head=("score.",),
    tokenizer=words_of_decoders,
    settings={"num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 3},
    rounding=0.3,
)
TINY_GPT_NEOX = TinyFamily(
    model_type="gpt_neox",
    layers="gpt_neox.layers",
    heads_in=(),
    values="attention.query_key_value",
    fused={"attention.query_key_value": "q0 k0 v0 q1 k1 v1 q2 k2 v2 q3 k3 v3"},
    heads_out="attention.dense",
    neurons_in=("mlp.dense_h_to_4h",),
    neurons_out="mlp.dense_4h_to_h",
    head=("score.",),
    tokenizer=words_of_decoders,
    settings={
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 3,
        "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5, "rope_type": "default"},
    },
    rounding=0.3,
)
TINY_OPT = TinyFamily(
    model_type="opt",
    layers="model.decoder.layers",
    heads_in=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    values="self_attn.v_proj",
    heads_out="self_attn.out_proj",
    neurons_in=("fc1",),
    neurons_out="fc2",
    head=("score.",),
    tokenizer=words_of_decoders,
    settings={"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 3, "activation_function": "gelu"},
    rounding=0.3,
    size_names=("hidden_size", "num_attention_heads", "num_hidden_layers", "ffn_dim"),
)
TINY_FALCON = TinyFamily(
    model_type="falcon",
    layers="transformer.h",
    heads_in=(),
    kv_heads=1,
    values="self_attention.query_key_value",
    fused={"self_attention.query_key_value": "q0 q1 q2 q3 k0 v0"},
    heads_out="self_attention.dense",
    neurons_in=("mlp.dense_h_to_4h",),
    neurons_out="mlp.dense_4h_to_h",
    head=("score.",),
    tokenizer=words_of_decoders,
    settings={"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 3},
    rounding=0.3,
    size_names=("hidden_size", "num_attention_heads", "num_hidden_layers", "ffn_hidden_size"),
)
WINDOW_OF_SECOND_LAYER = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
DECODERS = {
    "llama": TINY_LLAMA,
    "mistral": replace(TINY_LLAMA, model_type="mistral", settings={**TINY_LLAMA.settings, "sliding_window": 6}),
    "qwen2": replace(
        TINY_LLAMA,
        model_type="qwen2",
        tokenizer=qwen_byte_level_bpe,
        settings={**TINY_LLAMA.settings, **WINDOW_OF_SECOND_LAYER, "pad_token_id": 0},
    ),
    "qwen3": replace(
        TINY_LLAMA,
        model_type="qwen3",
        settings={**TINY_LLAMA.settings, **WINDOW_OF_SECOND_LAYER, "head_dim": 6, "attention_bias": True},
    ),
    # The first layer has positions, the second has none, and a window.
    "smollm3": replace(
        TINY_LLAMA,
        model_type="smollm3",
        settings={
            **TINY_LLAMA.settings,
            "no_rope_layer_interval": 2,
            "use_sliding_window": True,
            "sliding_window": 6,
        },
    ),
    "olmo2": replace(
        TINY_LLAMA,
        model_type="olmo2",
        heads_in=("self_attn.q_proj", "self_attn.q_norm"),
        kv_heads_in=("self_attn.k_proj", "self_attn.k_norm", "self_attn.v_proj"),
        normed_together=True,
    ),
    "gemma2": replace(
        TINY_LLAMA,
        model_type="gemma2",
        settings={
            **TINY_LLAMA.settings,
            "head_dim": 6,
            "query_pre_attn_scalar": 9,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "sliding_window": 6,
        },
    ),
    "gemma3": replace(
        TINY_LLAMA,
        model_type="gemma3_text",
        settings={
            **TINY_LLAMA.settings,
            "head_dim": 6,
            "query_pre_attn_scalar": 9,
            "final_logit_softcapping": 3.0,
            "sliding_window": 6,
            "sliding_window_pattern": 2,
        },
    ),
    "phi3": replace(
        TINY_LLAMA,
        model_type="phi3",
        heads_in=(),
        kv_heads_in=(),
        neurons_in=(),
        values="self_attn.qkv_proj",
        fused={
            "self_attn.qkv_proj": "q0 q1 q2 q3 k0 k1 v0 v1",
            "mlp.gate_up_proj": " ".join(f"{letter}{index}" for letter in "gu" for index in range(24)),
        },
        settings={**TINY_LLAMA.settings, "sliding_window": 6},
    ),
    "gpt2": TinyFamily(
        model_type="gpt2",
        layers="transformer.h",
        heads_in=(),
        values="attn.c_attn",
        fused={"attn.c_attn": "q0 q1 q2 q3 k0 k1 k2 k3 v0 v1 v2 v3"},
        transposed=True,
        heads_out="attn.c_proj",
        neurons_in=("mlp.c_fc",),
        neurons_out="mlp.c_proj",
        head=("score.",),
        tokenizer=words_of_decoders,
        settings={"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 3, "scale_attn_by_inverse_layer_idx": True},
        rounding=0.3,
        size_names=("n_embd", "n_head", "n_layer", "n_inner"),
    ),
    "gpt-neox": TINY_GPT_NEOX,
    "starcoder2": replace(
        TINY_LLAMA,
        model_type="starcoder2",
        neurons_in=("mlp.c_fc",),
        neurons_out="mlp.c_proj",
        settings={**TINY_LLAMA.settings, "sliding_window": 6},
    ),
    "falcon": TINY_FALCON,
    "falcon-new": replace(
        TINY_FALCON,
        kv_heads=2,
        fused={"self_attention.query_key_value": "q0 q1 k0 v0 q2 q3 k1 v1"},
        settings={**TINY_FALCON.settings, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    # As the ones that were trained on RefinedWeb alone.
    "falcon-sequential": replace(
        TINY_FALCON,
        kv_heads=4,
        fused={"self_attention.query_key_value": "q0 k0 v0 q1 k1 v1 q2 k2 v2 q3 k3 v3"},
        settings={**TINY_FALCON.settings, "multi_query": False, "parallel_attn": False, "bias": True, "alibi": True},
    ),
    "opt": TINY_OPT,
    # As the one of 350 million parameters.
    "opt-norms-last": replace(
        TINY_OPT, settings={**TINY_OPT.settings, "do_layer_norm_before": False, "word_embed_proj_dim": 12}
    ),
}
TINY_QWEN3_MOE = replace(
    TINY_LLAMA,
    model_type="qwen3_moe",
    experts=4,
    settings={**TINY_LLAMA.settings, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True},
    size_names=("hidden_size", "num_attention_heads", "num_hidden_layers", "moe_intermediate_size"),
)
TINY_MIXTURES: dict[str, TinyFamily] = {
    "qwen3_moe": TINY_QWEN3_MOE,
    "mixtral": replace(
        TINY_LLAMA,
        model_type="mixtral",
        experts=4,
        settings={**TINY_LLAMA.settings, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6},
    ),
}
"""Models whose layers are mixtures of experts."""
TINY_BART = TinyFamily(
    model_type="bart",
    stack="encoder",
    layers="model.encoder.layers",
    heads_in=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    values="self_attn.v_proj",
    heads_out="self_attn.out_proj",
    neurons_in=("fc1",),
    neurons_out="fc2",
    head=("classification_head.",),
    tokenizer=bart_byte_level_bpe,
    names_labels=True,
    settings={
        "decoder_layers": 2,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 24,
        "scale_embedding": True,
        "forced_eos_token_id": None,
    },
    size_names=("d_model", "encoder_attention_heads", "encoder_layers", "encoder_ffn_dim"),
)
TINY_BART = replace(
    TINY_BART,
    decoder=replace(
        TINY_BART,
        stack="decoder",
        layers="model.decoder.layers",
        cross_in=("encoder_attn.q_proj", "encoder_attn.k_proj", "encoder_attn.v_proj"),
        cross_values="encoder_attn.v_proj",
        cross_out="encoder_attn.out_proj",
    ),
)
TINY_T5 = TinyFamily(
    model_type="t5",
    stack="encoder",
    layers="transformer.encoder.block",
    heads_in=("layer.0.SelfAttention.q", "layer.0.SelfAttention.k", "layer.0.SelfAttention.v"),
    values="layer.0.SelfAttention.v",
    heads_out="layer.0.SelfAttention.o",
    neurons_in=("layer.1.DenseReluDense.wi",),
    neurons_out="layer.1.DenseReluDense.wo",
    head=("classification_head.",),
    tokenizer=t5_unigram,
    settings={
        "d_kv": 6,
        "n_positions": 48,
        "feed_forward_proj": "gelu",
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    },
    rounding=0.5,  # its attention is not scaled by the heads' width
    size_names=("d_model", "num_heads", "num_layers", "d_ff"),
)
TINY_T5 = replace(
    TINY_T5,
    decoder=replace(
        TINY_T5,
        stack="decoder",
        layers="transformer.decoder.block",
        cross_in=("layer.1.EncDecAttention.q", "layer.1.EncDecAttention.k", "layer.1.EncDecAttention.v"),
        cross_values="layer.1.EncDecAttention.v",
        cross_out="layer.1.EncDecAttention.o",
        neurons_in=("layer.2.DenseReluDense.wi",),
        neurons_out="layer.2.DenseReluDense.wo",
    ),
)
TINY_GATED_T5 = replace(
    TINY_T5,
    neurons_in=("layer.1.DenseReluDense.wi_0", "layer.1.DenseReluDense.wi_1"),
    decoder=replace(
        TINY_T5.decoder or TINY_T5, neurons_in=("layer.2.DenseReluDense.wi_0", "layer.2.DenseReluDense.wi_1")
    ),
    settings={**TINY_T5.settings, "feed_forward_proj": "gated-gelu", "num_decoder_layers": 2},
)
TINY_MT5 = replace(
    TINY_GATED_T5,
    model_type="mt5",
    decoder=replace(TINY_GATED_T5.decoder or TINY_GATED_T5, model_type="mt5"),
)
ENCODER_DECODERS = {"bart": TINY_BART, "t5": TINY_T5, "t5-gated": TINY_GATED_T5, "mt5": TINY_MT5}
TINY_VIT = TinyFamily(
    model_type="vit",
    layers="vit.layers",
    heads_in=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    values="attention.v_proj",
    heads_out="attention.o_proj",
    neurons_in=("mlp.fc1",),
    neurons_out="mlp.fc2",
    head=("classifier.",),
    tokenizer=image_processor("ViTImageProcessorPil", size={"height": 16, "width": 16}),
    settings={"image_size": 16, "patch_size": 4},
)
TINY_CLIP = replace(
    TINY_VIT,
    model_type="clip",
    layers="vision_model.encoder.layers",
    heads_in=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    values="self_attn.v_proj",
    heads_out="self_attn.out_proj",
    tokenizer=image_processor(
        "CLIPImageProcessorPil", size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    ),
    inner="vision_config",
)
TINY_VISION: dict[str, TinyFamily] = {"vit": TINY_VIT, "clip": TINY_CLIP}
"""Models that read images; their `tokenizer` makes an image processor."""
TINY_FAMILIES: dict[str, TinyFamily] = {
    "bert": TINY_BERT,
    "roberta": TINY_ROBERTA,
    "xlm-roberta": replace(TINY_ROBERTA, model_type="xlm-roberta", tokenizer=xlm_roberta_unigram),
    "camembert": replace(TINY_ROBERTA, model_type="camembert", tokenizer=camembert_unigram),
    "distilbert": TinyFamily(
        model_type="distilbert",
        layers="distilbert.transformer.layer",
        heads_in=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        values="attention.v_lin",
        heads_out="attention.out_lin",
        neurons_in=("ffn.lin1",),
        neurons_out="ffn.lin2",
        head=("pre_classifier.", "classifier."),
        tokenizer=wordpiece,
        size_names=("dim", "n_heads", "n_layers", "hidden_dim"),
    ),
    "electra": replace(
        TINY_BERT, model_type="electra", layers="electra.encoder.layer", settings={"embedding_size": 12}
    ),
    "deberta-v3": TINY_DEBERTA_V3,
    # As the xlarge models of v2, with all that a configuration can ask for besides.
    "deberta-v2": replace(
        TINY_DEBERTA_V3,
        heads_in=(*TINY_DEBERTA_V3.heads_in, "attention.self.pos_key_proj", "attention.self.pos_query_proj"),
        settings={
            **TINY_DEBERTA_V3.settings,
            "share_att_key": False,
            "conv_kernel_size": 3,
            "conv_act": "gelu",
            "embedding_size": 12,
            "position_biased_input": True,
            "type_vocab_size": 2,
        },
    ),
    "mpnet": replace(
        TINY_BERT,
        model_type="mpnet",
        layers="mpnet.encoder.layer",
        heads_in=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
        values="attention.attn.v",
        heads_out="attention.attn.o",
        tokenizer=mpnet_wordpiece,
        reserved_positions=2,
    ),
    "albert": replace(
        TINY_BERT,
        model_type="albert",
        layers="albert.encoder.albert_layer_groups",
        heads_in=tuple(f"albert_layers.0.attention.{what}" for what in ("query", "key", "value")),
        values="albert_layers.0.attention.value",
        heads_out="albert_layers.0.attention.dense",
        neurons_in=("albert_layers.0.ffn",),
        neurons_out="albert_layers.0.ffn_output",
        tokenizer=albert_unigram,
        settings={"embedding_size": 12},
        shares_layers=True,
    ),
    # The first layer sees all tokens, the second those in a window.
    "modernbert": TinyFamily(
        model_type="modernbert",
        layers="model.layers",
        heads_in=(),
        values="attn.Wqkv",
        heads_out="attn.Wo",
        neurons_in=(),
        neurons_out="mlp.Wo",
        fused={
            "attn.Wqkv": "q0 q1 q2 q3 k0 k1 k2 k3 v0 v1 v2 v3",
            "mlp.Wi": " ".join(f"{letter}{index}" for letter in "gu" for index in range(24)),
        },
        head=("head.", "classifier."),
        tokenizer=modernbert_byte_level_bpe,
        settings={
            "local_attention": 6,
            "classifier_pooling": "mean",
            "deterministic_flash_attn": True,
            **{f"{name}_token_id": place for place, name in enumerate(("pad", "unk", "cls", "sep"))},
            "bos_token_id": 2,
            "eos_token_id": 3,
        },
    ),
    **DECODERS,
    "bart": TINY_BART,
    "t5-gated": TINY_GATED_T5,
    "mt5": TINY_MT5,
    "gpt-neox-sequential": replace(TINY_GPT_NEOX, settings={**TINY_GPT_NEOX.settings, "use_parallel_residual": False}),
}
OF_EACH_FORM = ("bert", "deberta-v2", "modernbert", "albert", "llama", "gpt2")
"""Families that differ in what a head may depend on: a plain one, relative positions with a convolution, fused
matrices, shared layers, norms before the blocks with shared keys, and transposed matrices. Every family runs the tests
of one head."""
