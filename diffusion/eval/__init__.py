"""Measuring generators on the images that they stream, with the noise floor beside every figure."""

from diffusion.eval.distances import (
    Coverage,
    Kernel,
    energy_distance,
    frechet_distance,
    kernel_distance,
    mean_distance,
    precision_recall,
    sliced_wasserstein,
)
from diffusion.eval.extractors import (
    Extractor,
    InceptionExtractor,
    NetworkExtractor,
    RandomExtractor,
    classifier_features,
    extractor_of,
    open_classifier,
    squeezenet,
    timm_features,
)
from diffusion.eval.features import FeatureSet, Statistics, collect
from diffusion.eval.grids import compare_grids, sample_grid
from diffusion.eval.reference import Reference, reference_features
from diffusion.eval.report import GeneratorReport, comparison_table, evaluate_generator

__all__ = [
    "Coverage",
    "Extractor",
    "FeatureSet",
    "GeneratorReport",
    "InceptionExtractor",
    "Kernel",
    "NetworkExtractor",
    "RandomExtractor",
    "Reference",
    "Statistics",
    "classifier_features",
    "collect",
    "compare_grids",
    "comparison_table",
    "energy_distance",
    "evaluate_generator",
    "extractor_of",
    "frechet_distance",
    "kernel_distance",
    "mean_distance",
    "open_classifier",
    "precision_recall",
    "reference_features",
    "sample_grid",
    "sliced_wasserstein",
    "squeezenet",
    "timm_features",
]
