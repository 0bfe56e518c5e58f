"""Gated requests and others share no columns: each has its namespace in the radix cache."""

import pytest
from request_stand_in import CONFIG, OPT_OUT, request

from margingate.runtime.request.admission import attach
from margingate.runtime.request.record import CACHE_NAMESPACE


def test_gated_requests_have_radix_namespaces_of_their_own():
    keys = []
    for custom in (None, OPT_OUT):
        for extra in (None, "salt"):
            req = request(custom, extra_key=extra)
            attach(req, CONFIG)
            keys.append(req.extra_key)
    assert keys == [CACHE_NAMESPACE, CACHE_NAMESPACE + "salt", None, "salt"]


def test_two_keys_of_ungated_requests_never_share_a_namespace():
    given = ["x", "margingate:x", "not-margingate:x", "not-not-margingate:x", "not-x"]
    keys = []
    for extra in given:
        req = request(OPT_OUT, extra_key=extra)
        attach(req, CONFIG)
        keys.append(req.extra_key)
    assert len(set(keys)) == len(given)


@pytest.mark.parametrize("extra", [CACHE_NAMESPACE, CACHE_NAMESPACE + "salt"])
def test_a_request_that_is_not_gated_cannot_ask_for_a_gated_namespace(extra):
    """Its columns come from batched prefills: a gated prompt that met them would drift."""
    req = request(OPT_OUT, extra_key=extra)
    attach(req, CONFIG)
    assert not (req.extra_key or "").startswith(CACHE_NAMESPACE)
