"""What a worker's exception is taken for."""

import pytest
import torch

from trainer.errors import NumbersGoneWrong, WeightsDiffer
from trainer.parallel.failure import failure_from, first_cause

ECHO = "[gloo/transport/tcp/pair.cc:538] Connection closed by peer"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of 23.69"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        torch.distributed.DistBackendError("NCCL error: unhandled cuda error\nCuda failure 2 'out of memory'"),
    ],
)
def test_a_full_card_is_known_by_its_words(error: Exception) -> None:
    """Whoever says it: another strategy or more recomputation may fit."""
    failure = failure_from(2, error)
    assert (failure.kind, failure.exit_code) == ("memory", 1)
    assert failure.text == f"worker 2 ran out of its card's memory: {str(error).splitlines()[0]}"


def test_what_an_error_was_raised_from_counts() -> None:
    try:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        except RuntimeError as cause:
            raise ValueError("the block could not be run") from cause
    except ValueError as error:
        assert failure_from(0, error).kind == "memory"


@pytest.mark.parametrize(
    ("error", "kind"), [(NumbersGoneWrong("so it is"), "numerics"), (WeightsDiffer("so it is", 1), "corrupt")]
)
def test_what_goes_back_is_told_without_a_traceback(error: Exception, kind: str) -> None:
    failure = failure_from(1, error)
    assert (failure.kind, failure.exit_code, failure.message()) == (kind, 1, "so it is")


def test_of_those_whose_weights_differ_one_is_at_fault() -> None:
    assert failure_from(0, WeightsDiffer("so it is", 1)).kind == "lost_peer"


@pytest.mark.parametrize(
    ("error", "kind"),
    [(RuntimeError(ECHO), "lost_peer"), (RuntimeError("shapes do not match"), "error")],
)
def test_other_errors(error: Exception, kind: str) -> None:
    assert failure_from(1, error).kind == kind


def test_the_worker_whose_weights_differ_is_the_cause() -> None:
    """All say the same at once; it is one of them that is at fault."""
    said = [failure_from(rank, WeightsDiffer("the weights of worker 2", 2)) for rank in range(4)]
    cause = first_cause(said)
    assert cause is not None and (cause.kind, cause.rank, cause.message()) == ("corrupt", 2, "the weights of worker 2")
    gone_wrong = failure_from(1, NumbersGoneWrong("three in a row"))
    assert (gone_wrong.kind, gone_wrong.message(), gone_wrong.exit_code) == ("numerics", "three in a row", 1)
