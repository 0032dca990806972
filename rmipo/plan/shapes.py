"""Architectures by model name, so that planning works before a gated model may be downloaded."""

from accelerate import init_empty_weights
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights

from rmipo.errors import ConfigError

LLAMA3 = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 8192}
LLAMA3_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA3_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
MISTRAL_7B = {**LLAMA3_8B, "vocab_size": 32000, "num_key_value_heads": 8}
SMOLLM2_135M = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip

# The models of the recipes and the sizes that their model cards state.
KNOWN = {
    "meta-llama/Meta-Llama-3-8B": (LlamaConfig, LLAMA3 | LLAMA3_8B),
    "meta-llama/Meta-Llama-3-8B-Instruct": (LlamaConfig, LLAMA3 | LLAMA3_8B),
    "princeton-nlp/Llama-3-Base-8B-SFT": (LlamaConfig, LLAMA3 | LLAMA3_8B),
    "meta-llama/Meta-Llama-3-70B-Instruct": (LlamaConfig, LLAMA3 | LLAMA3_70B),
    "meta-llama/Llama-3.3-70B-Instruct": (LlamaConfig, LLAMA3 | LLAMA3_70B),
    "mistralai/Mistral-7B-v0.1": (MistralConfig, MISTRAL_7B),
    "mistralai/Mistral-7B-Instruct-v0.2": (MistralConfig, MISTRAL_7B),
    "alignment-handbook/zephyr-7b-sft-full": (MistralConfig, MISTRAL_7B),
    "HuggingFaceTB/SmolLM2-135M-Instruct": (LlamaConfig, SMOLLM2_135M),
    "outputs/smollm2-135m-instruct/weights": (LlamaConfig, SMOLLM2_135M),
}


def load_config(name: str, revision: str | None = None) -> PreTrainedConfig:
    """The model's configuration: built in for the recipes' models, otherwise from its folder, the cache or the hub.

    Raises ValueError where it can't be had.
    """
    if name in KNOWN:
        cls, sizes = KNOWN[name]
        return cls(**sizes)
    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"model_name_or_path: {name} has no readable config.json ({reason})") from error


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model's modules without weights; what is tied is not.

    Not by AutoModel: in a training process under ZeRO-3 that divides what it makes over the processes.
    """
    with init_empty_weights(), no_init_weights():  # drawing random numbers into nothing takes most of the time
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
