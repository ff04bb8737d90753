"""Batching strategies: an open registry of functions; plans of strategies added by users are checked."""

import math
from collections.abc import Callable
from functools import wraps
from inspect import signature

import numpy as np

from smartbatch_lightning.batching.arrays import argsort, split_runs, tutorial_draws
from smartbatch_lightning.batching.layout import PlanRequest
from smartbatch_lightning.batching.plan import BatchPlan
from smartbatch_lightning.errors import UsageError
from smartbatch_lightning.registry import look_up

Strategy = Callable[[PlanRequest], BatchPlan]


def smart(request: PlanRequest) -> BatchPlan:
    """Sorts the samples by length, cuts them into contiguous batches, and shuffles the batches.

    Length-grouped batching as popularised by Chris McCormick's *Smart Batching Tutorial* (2020), after Michaël
    Benesty; batches are cut in one pass instead of being drawn, and `jitter` moves their boundaries.
    """
    jitter = float(request.spec.jitter)
    order = argsort(request.lengths, request.bit_generator, spread=2 * jitter)
    headroom = 0 if request.bit_generator is None else math.ceil(max(2 * jitter, 1)) - 1
    return request.shuffle_steps(request.cut_sorted(order, headroom))


def tutorial(request: PlanRequest) -> BatchPlan:
    """Draws random contiguous runs from what is left of the sorted samples, as the *Smart Batching Tutorial* does.

    The longest sample of a run varies from epoch to epoch, so under a token budget, a batch has only as many samples as
    fit at any length.
    """
    order = argsort(request.lengths, None)
    if request.bit_generator is None:
        return request.cut_sorted(order)
    ranks = request.num_replicas
    run = request.samples_per_batch * ranks
    draws, steps = tutorial_draws(len(order), run, request.num_steps, ranks, request.bit_generator)
    return BatchPlan(order[draws], split_runs(steps, ranks), ranks)


def random(request: PlanRequest) -> BatchPlan:
    """Shuffles; on several ranks each step's samples are balanced by length, which does not change its gradient."""
    return request.cut(argsort(np.zeros(len(request.lengths), np.int64), request.bit_generator))


STRATEGIES: dict[str, Strategy] = {"random": random, "tutorial": tutorial, "smart": smart}
_OWN = frozenset(STRATEGIES.values())


def register_strategy(name: str) -> Callable[[Strategy], Strategy]:
    """Decorator that registers a strategy under a name for `batching`.

    A strategy takes a `PlanRequest` and returns a `BatchPlan`; `request.cut(order)` creates one from any sample order.
    """

    def register(strategy: Strategy) -> Strategy:
        STRATEGIES[name] = strategy
        return strategy

    return register


def find_strategy(batching: str) -> Strategy:
    """The strategy with a name or import path; unless it is the package's own, every plan it returns is checked.

    Raises:
        ValueError: There is none, or it is not a function of one argument.
    """
    strategy = look_up(batching, STRATEGIES, "batching")
    if not _takes_one_argument(strategy):
        raise UsageError(f"batching is {batching!r}, which is not a function of a PlanRequest; give a strategy.")
    if strategy in _OWN:
        return strategy

    @wraps(strategy)
    def checked(request: PlanRequest) -> BatchPlan:
        plan = strategy(request)
        _check_plan(plan, request, batching)
        return plan

    return checked


def _takes_one_argument(strategy: object) -> bool:
    if not callable(strategy):
        return False
    try:
        signature(strategy).bind(None)
    except ValueError:  # some functions written in C have no signature
        return True
    except TypeError:
        return False
    return True


def _check_plan(plan: BatchPlan, request: PlanRequest, batching: str) -> None:
    """Rejects a plan that does not keep the promises of `plan_epoch`.

    Raises:
        ValueError: A sample is missing or repeated, ranks have unequal steps, or a batch is too large.
    """
    if not isinstance(plan, BatchPlan):
        raise UsageError(f"the strategy {batching!r} returned {type(plan).__name__}; return a BatchPlan.")
    num_samples = len(request.lengths)
    order = np.asarray(plan.order)
    if len(order) != num_samples or not np.array_equal(np.sort(order), np.arange(num_samples)):
        raise UsageError(
            f"the plan of the strategy {batching!r} does not hold each of the {num_samples} samples exactly once. "
            "Build it from a permutation of them."
        )
    sizes = plan.batch_sizes()
    if plan.num_replicas != request.num_replicas or len(plan) % request.num_replicas or sizes.min() < 1:
        raise UsageError(
            f"the plan of the strategy {batching!r} has {len(plan)} batches, the smallest of {sizes.min()} samples, "
            f"for {request.num_replicas} ranks. Give every rank the same number of batches, none of them empty."
        )
    tokens = request.spec.tokens(request.lengths[order], plan.offsets)
    if request.is_too_large(int(sizes.max()), int(tokens.max())):
        raise UsageError(
            f"the strategy {batching!r} made batches of up to {sizes.max()} samples and {tokens.max()} tokens, more "
            "than the batch size or the token budget allows. Build its plans with PlanRequest.cut."
        )
