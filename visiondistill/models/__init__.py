"""Networks behind one interface: any classifier, with its own pixels and its features by stage."""

from visiondistill.models.cifar import register as register_with_timm
from visiondistill.models.cost import count_flops, count_parameters, ideal_step_cost
from visiondistill.models.create import ClassPath, Timm
from visiondistill.models.loaded import LoadedNetwork, require_classes
from visiondistill.models.network import Network, Outputs, as_network, evaluating
from visiondistill.models.small import SmallConvNet, SmallMLP
from visiondistill.weights import WeightsSource, load_weights, read_weights

__all__ = [
    "ClassPath",
    "LoadedNetwork",
    "Network",
    "Outputs",
    "SmallConvNet",
    "SmallMLP",
    "Timm",
    "WeightsSource",
    "as_network",
    "count_flops",
    "count_parameters",
    "evaluating",
    "ideal_step_cost",
    "load_weights",
    "read_weights",
    "register_with_timm",
    "require_classes",
]
