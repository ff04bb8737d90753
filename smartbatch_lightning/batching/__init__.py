"""Which samples make up a batch, and what it costs; needs only numpy."""

from smartbatch_lightning.batching.layout import PlanRequest
from smartbatch_lightning.batching.plan import BatchPlan, batch_overlap
from smartbatch_lightning.batching.planner import plan_epoch
from smartbatch_lightning.batching.spec import BatchSpec
from smartbatch_lightning.batching.strategies import STRATEGIES, register_strategy

__all__ = ["STRATEGIES", "BatchPlan", "BatchSpec", "PlanRequest", "batch_overlap", "plan_epoch", "register_strategy"]
