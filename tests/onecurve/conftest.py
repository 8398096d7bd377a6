"""Settings of all processes that these tests start."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="package", autouse=True)
def patient_threads() -> Iterator[None]:
    """Threads that sleep while they wait: on busy cores, spinning ones take ten times as long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_WAIT_POLICY", "PASSIVE")
        yield
