"""The Inception Score (Salimans et al. 2016): is each sample clearly of one class, do all classes occur?"""

import torch
from torch import Tensor

SPLIT = 5000


def inception_score(probabilities_NK: Tensor, split: int = SPLIT) -> tuple[float, float]:
    """Mean and standard deviation, over parts of ``split`` samples, of exp(mean KL(p(y|x) || p(y))); float64.

    As in ADM's evaluator: parts follow the samples' order, which must not be sorted by class; the last part
    may be shorter; a single part has deviation 0. The score is between 1 (all alike) and K (one-hot, all
    classes equally frequent).
    """
    scores = []
    for part in probabilities_NK.split(split):
        p = part.double()
        marginal = p.mean(0)
        divergence = (torch.xlogy(p, p) - torch.xlogy(p, marginal)).sum(1).mean()
        scores.append(divergence.exp())
    stacked = torch.stack(scores)
    return stacked.mean().item(), stacked.std(correction=0).item()
