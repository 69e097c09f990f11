"""Mixtures whose components, and rows if one likes, are sharded over the processes of a torch.distributed group.

The functions have the names of those of one process.  `import fastvae` does not import this package.
"""

from fastvae.distributed.exemplars import ShardedExemplarPrior
from fastvae.distributed.functional import mixture_kl, mixture_log_prob, mixture_log_prob_and_score

__all__ = ["ShardedExemplarPrior", "mixture_kl", "mixture_log_prob", "mixture_log_prob_and_score"]
