"""Image quality: FID, sFID, Inception Score, precision and recall, with any feature network."""

from .extractors import Extractor, open_extractor
from .features import Features, extract, load_features, save_features
from .frechet import frechet_distance
from .inception import INCEPTION, is_published
from .inception_score import inception_score
from .metrics import METRICS, check_same_network, evaluate, missing, parse_metrics, warnings
from .moments import Moments, MomentSum, moments
from .neighbours import precision_recall
from .reference import Opened, complete, open_source
from .sources import Images, check_same_size

__all__ = [
    "INCEPTION",
    "METRICS",
    "Extractor",
    "Features",
    "Images",
    "MomentSum",
    "Moments",
    "Opened",
    "check_same_network",
    "check_same_size",
    "complete",
    "evaluate",
    "extract",
    "frechet_distance",
    "inception_score",
    "is_published",
    "load_features",
    "missing",
    "moments",
    "open_extractor",
    "open_source",
    "parse_metrics",
    "precision_recall",
    "save_features",
    "warnings",
]
