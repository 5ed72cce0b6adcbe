"""What needs a Ray cluster beside the one that a run uses by itself: a pool of workers that evaluate what it commits."""

from distckpt.integrations.ray_evaluation import Evaluated, Evaluation, evaluate

__all__ = ["Evaluated", "Evaluation", "evaluate"]
