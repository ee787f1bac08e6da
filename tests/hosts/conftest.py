from collections.abc import Iterator

import pytest

from benchmarks.two_hosts import CannotHaveHosts, TwoHosts


@pytest.fixture(scope="module")
def hosts(request: pytest.FixtureRequest) -> Iterator[TwoHosts]:
    """Two, joined by a link of the module's `MBIT` Mbit/s."""
    try:
        with TwoHosts(request.module.MBIT) as made:
            yield made
    except CannotHaveHosts as error:
        pytest.skip(f"no network namespaces here: {error}")
