"""QEMU's objects for TLS and authorization."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nbdfleece.errors import UsageError
from nbdfleece.standalone.objects import Objects, Rule, Rules

LAPTOP = "C=GB,O=Example\\, Inc.,CN=laptop.example.com"
"""As the server names it; the certificate has the parts in the opposite order."""
LAPTOP_RULE = "CN=laptop.example.com,O=Example\\, Inc.,C=GB"


def refusal(text: str, identity: str | None) -> str | None:
    objects = Objects()
    objects.add(text)
    return objects.authorizer("a").refusal("disk", identity)


def test_simple_authorization_allows_one_identity() -> None:
    text = f"authz-simple,id=a,identity={LAPTOP_RULE.replace(',', ',,')}"
    assert refusal(text, LAPTOP) is None
    assert refusal(text, "CN=other") == "'CN=other' may not use export 'disk'"
    assert "authenticate" in (refusal(text, None) or "")


def test_first_rule_of_a_list_that_fits_decides() -> None:
    text = (
        "authz-list,id=a,policy=deny,rules.0.match=CN=evil*,rules.0.policy=deny,"
        "rules.0.format=glob,rules.1.match=CN=*,rules.1.policy=allow,rules.1.format=glob"
    )
    assert refusal(text, "CN=evil twin")
    assert refusal(text, "CN=good") is None
    assert refusal(text, "O=none")


def test_list_without_a_rule_that_fits_follows_its_policy() -> None:
    assert refusal("authz-list,id=a", "x")
    assert refusal("authz-list,id=a,policy=allow", "x") is None


def test_objects_may_be_json() -> None:
    rules = [{"match": "x", "policy": "allow"}]
    text = json.dumps({"qom-type": "authz-list", "id": "a", "rules": rules})
    assert refusal(text, "x") is None
    assert refusal(text, "y")


def test_list_in_a_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "acl.json"
    path.write_text(json.dumps({"rules": [{"match": "x", "policy": "allow"}], "policy": "deny"}))
    objects = Objects()
    objects.add(f"authz-list-file,id=fresh,filename={path}")
    objects.add(f"authz-list-file,id=stale,filename={path},refresh=off")
    fresh, stale = objects.authorizer("fresh"), objects.authorizer("stale")
    assert fresh.refusal("disk", "x") is None
    path.write_text("{}")
    assert fresh.refusal("disk", "x")
    assert stale.refusal("disk", "x") is None
    path.write_text("not JSON")
    assert fresh.refusal("disk", "x")


@pytest.mark.parametrize(
    ("match", "identity", "fits"),
    [("a*c", "abbc", True), ("a?c", "abc", True), ("a?c", "ac", False), ("[ab]", "a", False)],
)
def test_glob_knows_star_and_question_mark(match: str, identity: str, fits: bool) -> None:
    assert Rule(match, allows=True, is_glob=True).fits(identity) is fits
    assert not Rules((Rule("x", allows=False),), otherwise=True).allow("x")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("secret,id=s,data=x", "'secret' are not supported"),
        ("tls-creds-anon,id=t,endpoint=server", "'tls-creds-anon' are not supported"),
        ("authz-pam,id=a,service=x", "'authz-pam' are not supported"),
        ("authz-simple,identity=x", "'id' is missing"),
        ("authz-simple,id=a", "'identity' is missing"),
        ("authz-simple,id=a,identity=x,zz=1", "does not support the option 'zz'"),
        ("tls-creds-x509,id=t,endpoint=server", "'dir' is missing"),
        ("tls-creds-x509,id=t,dir=/,endpoint=both", "one of server, client"),
        ("tls-creds-x509,id=t,dir=/,priority=NORMAL", "does not support the option 'priority'"),
        ("tls-creds-x509,id=t,dir=/,passwordid=s", "does not support the option 'passwordid'"),
        ("authz-list-file,id=a,filename=/nonexistent", "cannot read /nonexistent"),
        ("authz-list,id=a,rules.1.match=x,rules.1.policy=allow", "numbered from 0"),
        ("authz-list,id=a,rules.0.match=x", "both needed"),
    ],
)
def test_object_that_cannot_be_is_refused(text: str, error: str) -> None:
    with pytest.raises(UsageError, match=error):
        Objects().add(text)


def test_credentials_are_found_by_id_and_endpoint(tmp_path: Path) -> None:
    objects = Objects()
    objects.add(f"tls-creds-x509,id=t,dir={tmp_path},endpoint=server,verify-peer=no")
    objects.add("authz-simple,id=a,identity=x")
    assert objects.tls("t", "server").directory == tmp_path
    assert not objects.tls("t", "server").verify_peer
    for name, endpoint in (("t", "client"), ("a", "server"), ("zz", "server")):
        with pytest.raises(UsageError, match=f"'{name}'"):
            objects.tls(name, endpoint)  # type: ignore[arg-type]  # the loop's words are strings
    with pytest.raises(UsageError, match="already"):
        objects.add("authz-simple,id=t,identity=x")
    with pytest.raises(UsageError, match="No authorization"):
        objects.authorizer("t")
