"""The sizes of a model from its configuration alone, so that a gated model can be planned for before it may be read."""

from dataclasses import dataclass

from accelerate import init_empty_weights
from peft import PeftConfig, get_peft_model
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, LlamaConfig, MistralConfig, PreTrainedConfig
from transformers.initialization import no_init_weights

from rmipo.errors import ConfigError

# Sizes as the model cards of the recipes' gated models, and of those made from them, state them.
SIZES_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
SIZES_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
LLAMA3_8B = LlamaConfig(vocab_size=128256, num_key_value_heads=8, **SIZES_8B)
LLAMA3_70B = LlamaConfig(vocab_size=128256, num_key_value_heads=8, **SIZES_70B)
MISTRAL_7B = MistralConfig(vocab_size=32000, num_key_value_heads=8, **SIZES_8B)
KNOWN = {
    "meta-llama/Meta-Llama-3-8B": LLAMA3_8B,
    "meta-llama/Meta-Llama-3-8B-Instruct": LLAMA3_8B,
    "princeton-nlp/Llama-3-Base-8B-SFT": LLAMA3_8B,
    "meta-llama/Meta-Llama-3-70B-Instruct": LLAMA3_70B,
    "mistralai/Mistral-7B-v0.1": MISTRAL_7B,
    "mistralai/Mistral-7B-Instruct-v0.2": MISTRAL_7B,
    "alignment-handbook/zephyr-7b-sft-full": MISTRAL_7B,
}


def load_config(name: str, revision: str | None = None) -> PreTrainedConfig:
    """Built in for the recipes' models, otherwise from the model's folder, the cache or the hub. Raises ConfigError."""
    if name in KNOWN:
        return KNOWN[name]
    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"model_name_or_path: {name} has no readable config.json ({reason})") from error


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes. `queries_and_keys`: (heads of queries + heads of keys) x head dimension."""

    parameters: int
    trained: int
    layers: int
    hidden: int
    queries_and_keys: int
    intermediate: int
    vocabulary: int

    @property
    def linear(self) -> int:
        """Parameters of the linear layers that quantization covers."""
        return self.layers * self.hidden * (2 * self.queries_and_keys + 3 * self.intermediate)

    @classmethod
    def of(cls, config: PreTrainedConfig, peft_config: PeftConfig | None = None) -> "Shape":
        # Not by AutoModel: in a training process under ZeRO-3 that divides what it makes over the processes.
        with init_empty_weights(), no_init_weights():  # drawing random numbers into nothing takes most of the time
            model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
            model.tie_weights()  # tied ones are one parameter
            parameters = model.num_parameters()
            if peft_config is not None:
                model = get_peft_model(model, peft_config)
        text = config.get_text_config()
        # Some, such as Gemma, state it; for others it follows.
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return cls(
            parameters=parameters,
            trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            queries_and_keys=(text.num_attention_heads + text.num_key_value_heads) * head_dim,
            intermediate=text.intermediate_size,
            vocabulary=text.vocab_size,
        )
