"""A shorter model out of a longer one: its first layers, between its embedding and its output layer."""

from torch import nn
from transformers import PreTrainedModel

from cllm_core.errors import ConfigError, ModelLoadError


def keep_first_layers(model: PreTrainedModel, num_layers: int) -> None:
    """Remove all layers but the first `num_layers`, from the model and its configuration.

    Raises:
        ConfigError: the model has fewer.
        ModelLoadError: its layers do not stand in one list.
    """
    config = model.config.get_text_config(decoder=True)
    num_before = config.num_hidden_layers
    if num_layers > num_before:
        raise ConfigError(f"layers={num_layers}: the model has {num_before}; give fewer")
    decoder = model.get_decoder()
    lists = [
        (name, module)
        for name, module in decoder.named_children()
        if isinstance(module, nn.ModuleList) and len(module) == num_before
    ]
    if len(lists) != 1:
        raise ModelLoadError(f"{type(model).__name__}: layers cannot be left out, as they do not stand in one list")
    (name, layers) = lists[0]
    setattr(decoder, name, layers[:num_layers])
    config.num_hidden_layers = num_layers
    for field, value in list(vars(config).items()):  # layer_types, mlp_layer_types, no_rope_layers, ...
        if "layer" in field and isinstance(value, list) and len(value) == num_before:
            setattr(config, field, value[:num_layers])
