"""The fuzzing step, driven by hypothesis for about half a minute; see fuzz.py."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.converters.fuzz import step


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.binary(min_size=12, max_size=64))
def test_only_clean_errors(data):
    step(data)
