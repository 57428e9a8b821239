"""Models over a paged cache as the backends make them, with parts that run on any machine."""

from transformers import PreTrainedModel

from cllm_core.backends.cuda.graphed_model import GraphedModel
from cllm_core.backends.cuda.static_steps import Buckets, Capture
from cllm_core.backends.paged_model import PagedModel
from cllm_core.backends.step_tables import AttentionByTables
from cllm_core.backends.torch_plain import TorchBackend
from cllm_core.info import ComputePath, ComputePaths
from cllm_core.models.adapter_bank import AdapterBank
from cllm_core.models.probe import probe_layers
from tests.backends.table_attention import attend_plainly

_TEST = ComputePath("test")
PATHS = ComputePaths(backend=_TEST, attention=_TEST, layers=_TEST, output_layer=_TEST)


def plain(model: PreTrainedModel) -> PagedModel:
    """Attends by gathering, as transformers' layers are: the reference."""
    return TorchBackend().prepare(model)


def by_tables(model: PreTrainedModel, adapters: AdapterBank | None = None) -> PagedModel:
    attention = AttentionByTables(attend_plainly, model.device)
    return PagedModel(model, probe_layers(model), attention, PATHS, adapters=adapters)


def graphed(model: PreTrainedModel, capture: Capture, buckets: Buckets) -> GraphedModel:
    attention = AttentionByTables(attend_plainly, model.device)
    return GraphedModel(model, probe_layers(model), attention, PATHS, capture=capture, buckets=buckets)
