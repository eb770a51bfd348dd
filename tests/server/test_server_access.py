"""Who may read and write: other sites, other names of this machine, wrong tokens, requests that are too large."""

import json

import pytest
from tiny import GRID

from .conftest import PORT, TOKEN

OWN = f"http://127.0.0.1:{PORT}"
ROUTES = [
    *("/api/summary", "/api/prompts", "/api/groups?prompt=1", "/api/images", "/api/statistics?axis=top_k"),
    *("/api/judgements", "/api/changes", f"/image/{'0' * 16}/{'0' * 32}"),
]


def assert_refused(response, status=403):
    assert response.status_code == status, response.text
    assert TOKEN not in response.text and TOKEN not in str(response.headers)
    assert len(response.json()["error"].splitlines()) == 1


def test_routes_need_the_cookie_of_the_page(make_client):
    client = make_client(has_cookie=False)
    for route in ROUTES:
        assert_refused(client.get(route))
        for cookie in ("", TOKEN[:-1], TOKEN + "x", "é"):
            assert_refused(client.get(route, headers={"Cookie": f"dm-generations-{PORT}={cookie}".encode()}))
        assert_refused(client.get(route, headers={"Cookie": f"dm-generations-1={TOKEN}"}))
    assert client.get("/").status_code == 200  # on this machine alone, the page gives it
    for route in ROUTES:
        assert client.get(route).status_code in (200, 404)


def test_with_a_host_the_page_needs_the_token(make_client):
    client = make_client(host="0.0.0.0", has_cookie=False)
    assert_refused(client.get("/"))
    assert_refused(client.get("/?token="))
    assert_refused(client.get("/?token=wrong"))
    opened = client.get("/", params={"token": TOKEN})
    assert opened.status_code == 303 and opened.headers["location"] == "/"
    cookie = opened.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=lax" in cookie
    assert client.get("/").status_code == 200 and client.get("/api/summary").status_code == 200
    assert_refused(client.get("/?token=wrong"))


def test_a_rebound_name_is_refused(reader):
    for host in ("evil.example", f"evil.example:{PORT}", "127.0.0.1.evil.example", "localhost.evil.example", "", "["):
        for route in ("/", *ROUTES):
            assert_refused(reader.get(route, headers={"Host": host}))


def test_own_names_are_answered(reader):
    for host in ("localhost", f"localhost:{PORT}", f"127.0.0.1:{PORT}", "[::1]:80", "LOCALHOST"):
        assert reader.get("/", headers={"Host": host}).status_code == 200


def test_the_given_host_is_a_name_too(make_client):
    assert make_client(host="pictures.example").get("/", headers={"Host": "pictures.example:80"}).status_code == 200


def post(client, body=b"[]", **headers):
    return client.post("/api/judgements", content=body, headers={"X-Token": TOKEN, "Origin": OWN, **headers})


def test_writing_needs_the_token_and_the_same_origin(reader):
    assert post(reader).json() == {"stored": 0}
    for token in ("", "wrong", TOKEN + " x"):
        assert_refused(post(reader, **{"X-Token": token}))
    for origin in (
        "https://evil.example",
        "null",
        "http://127.0.0.1:1",
        f"https://127.0.0.1:{PORT}",
        "http://localhost",
    ):
        assert_refused(post(reader, Origin=origin))
    assert_refused(post(reader, **{"Sec-Fetch-Site": "cross-site"}))
    assert_refused(post(reader, **{"Sec-Fetch-Site": "same-site"}))


def test_writing_needs_the_cookie(make_client):
    assert_refused(post(make_client(has_cookie=False)))


def test_a_large_body_is_refused(reader):
    assert_refused(post(reader, b"[" + b" " * 50_000_000 + b"]"), 413)
    assert post(reader).status_code == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
@pytest.mark.parametrize("route", ["/", "/api/summary", "/api/images"])
def test_other_methods_are_refused(reader, route, method):
    response = reader.request(method, route, content=b"x" * 100_000)
    assert response.status_code == 405
    assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize(
    "path",
    [
        *("/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/samplebrowser.html", "/a.db", "/api", "/image/x"),
        *(f"/image/../{'0' * 32}", "/image/{codec}/..%2f..%2fa.db", "/image/{codec}/%2e%2e", "/image/{codec}/a.db"),
        *("/image/{codec}/" + "0" * 31, "/image/{codec}/" + "A" * 32, "/image/{codec}/" + "0" * 32 + "/x"),
        *("/image/..%2f..%2f/" + "0" * 32, "/image/{codec}/" + "%00" * 32, "/image/{codec}/" + "\u0660" * 32),
    ],
)
def test_no_other_path_is_served(reader, codec, path):
    assert_refused(reader.get(path.replace("{codec}", codec.sha256[:16])), 404)


def test_every_answer_has_the_headers_that_other_sites_meet(reader):
    for route in ("/", "/api/summary", "/nothing", "/image/x/y"):
        headers = reader.get(route).headers
        assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "access-control-allow-origin" not in headers


def test_prompts_are_json_alone(reader):
    answer = reader.get("/api/prompts")
    assert answer.headers["content-type"] == "application/json" and GRID
    assert json.loads(answer.text)["total"] == 2
