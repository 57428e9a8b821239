"""Holds the weights of a model's matrix products in 8 bits: half the memory to read, which is what a step of few tokens
waits for. The kernels round inputs to 8 bits too, so that products are of whole numbers.
"""

from transformers import PreTrainedModel

from cllm_core.backends.cpu.panels import has_only_panels, panel_weights, replace_weights
from cllm_core.backends.cpu.weights import INT8_GROUP, PanelWeight


def quantise_weights(model: PreTrainedModel) -> int:
    """Round all weights in panels, those of the output layer and embeddings tied to it included.

    Returns:
        Bytes saved. 0, and nothing is changed, where the output layer or a product of a fused layer is not by our own
        kernels, or not of whole groups of inputs.
    """
    if not has_only_panels(model) or any(weight.num_in % INT8_GROUP for weight in panel_weights(model)):
        return 0
    before = sum(weight.num_bytes for weight in panel_weights(model))
    replace_weights(model, PanelWeight.to_int8)
    return before - sum(weight.num_bytes for weight in panel_weights(model))
