//! Every way to ask wrongly, and the name it gets.

use sluice_engine::limits::{CHUNK_LEN, MAX_FILE_LEN};
use sluice_engine::revocations::Revocation;
use sluice_node::token::TokenGrant;

use crate::client::{Datacenter, everything, head, now};
use crate::use_cases::{ID, content};

type Problem = (u16, String);

fn problem(status: u16, code: &str) -> Problem {
    (status, code.to_owned())
}

#[tokio::test]
async fn chunks_that_do_not_fit() {
    let dc = Datacenter::start();
    dc.create(ID, 4 * CHUNK_LEN + 5).await;
    let full = content(CHUNK_LEN);
    let put = async |index: &str, body: &[u8]| {
        dc.ask(&format!("PUT /v1/files/{ID}/chunks/{index}"), body).await.problem()
    };
    assert_eq!(put("5", &full).await, problem(400, "chunk-index"));
    assert_eq!(put("36507222016", &full).await, problem(400, "chunk-index"));
    assert_eq!(put("99999999999999999999999", &full).await, problem(400, "invalid-parameter"));
    assert_eq!(put("-1", &full).await, problem(400, "invalid-parameter"));
    assert_eq!(put("1", &full[1..]).await, problem(400, "chunk-length"));
    assert_eq!(put("4", &full[..6]).await, problem(400, "chunk-length"));
    assert_eq!(put("4", &full[..4]).await, problem(400, "chunk-length"));
    assert_eq!(put("0", b"").await, problem(400, "chunk-length"));
    assert_eq!(put("1", &content(2 * CHUNK_LEN)).await, problem(400, "chunk-alignment"));
    assert_eq!(put("0", &content(3 * CHUNK_LEN)).await, problem(400, "chunk-alignment"));

    dc.create("0293e4a0-7b1c-7def-8123-456789abcdef", 64 * CHUNK_LEN).await;
    let nine = content(9 * CHUNK_LEN);
    let many = dc.ask("PUT /v1/files/0293e4a0-7b1c-7def-8123-456789abcdef/chunks/0", &nine[..9 << 20]).await;
    assert_eq!(many.problem(), problem(400, "chunk-alignment"));
}

#[tokio::test]
async fn other_bytes_and_wrong_values() {
    let dc = Datacenter::start();
    dc.create(ID, CHUNK_LEN).await;
    let mut bytes = content(CHUNK_LEN);
    let path = format!("PUT /v1/files/{ID}/chunks/0");
    let wrong = format!("Chunk-Value: {}\r\n", "ab".repeat(32));
    assert_eq!(dc.ask_with(&path, &wrong, &bytes).await.problem(), problem(422, "chunk-value"));
    for malformed in ["Chunk-Value: zz\r\n", "Chunk-Value: \r\n"] {
        let answer = dc.ask_with(&path, malformed, &bytes).await;
        assert_eq!(answer.problem(), problem(400, "invalid-parameter"));
    }
    let two = format!("Chunk-Value: {0}, {0}\r\n", "ab".repeat(32));
    assert_eq!(dc.ask_with(&path, &two, &bytes).await.problem(), problem(400, "invalid-parameter"));
    assert_eq!(dc.ask(&path, &bytes).await.status, 200);
    bytes[77] ^= 1;
    assert_eq!(dc.ask(&path, &bytes).await.problem(), problem(409, "chunk-conflict"));
}

#[tokio::test]
async fn metadata_that_is_none() {
    let dc = Datacenter::start();
    let create = async |body: &[u8]| dc.ask("POST /v1/files", body).await.problem();
    let invalid = problem(400, "invalid-metadata");
    for body in [
        &b""[..],
        b"{",
        b"[]",
        br#"{"size":"5"}"#,
        br#"{"size":-1}"#,
        br#"{"size":1.5}"#,
        br#"{"size":99999999999999999999999}"#,
        br#"{"size":1,"sise":2}"#,
        br#"{"size":1,"size":2}"#,
        br#"{"size":1,"id":"x"}"#,
        br#"{"size":1,"expected_root":"zz"}"#,
        br#"{"size":1,"name":"a\u0000b"}"#,
        br#"{"size":1,"name":"\ud800"}"#,
        b"{\"size\":1,\"name\":\"\xFF\xFE\"}",
        br#"{"size":1,"content_type":"text/\u00fcl"}"#,
        br#"{"size":1,"metadata":{"":"v"}}"#,
        br#"{"size":1,"expires_in":99999999999}"#,
    ] {
        assert_eq!(create(body).await, invalid, "{}", String::from_utf8_lossy(body));
    }
    let name = format!(r#"{{"size":1,"name":"{}"}}"#, "n".repeat(1025));
    assert_eq!(create(name.as_bytes()).await, invalid);
    let value = format!(r#"{{"size":1,"metadata":{{"k":"{}"}}}}"#, "v".repeat(2049));
    assert_eq!(create(value.as_bytes()).await, invalid);
    let many: Vec<String> = (0..65).map(|i| format!(r#""k{i}":"v""#)).collect();
    assert_eq!(
        create(format!(r#"{{"size":1,"metadata":{{{}}}}}"#, many.join(",")).as_bytes()).await,
        invalid
    );
    let deep = format!("{}{}", "[".repeat(30_000), "]".repeat(30_000));
    assert_eq!(create(deep.as_bytes()).await, invalid);
    let huge = format!(r#"{{"size":1,"name":"{}"}}"#, "n".repeat(70_000));
    assert_eq!(create(huge.as_bytes()).await, problem(413, "too-large"));
    let size = format!(r#"{{"size":{}}}"#, MAX_FILE_LEN + 1);
    assert_eq!(create(size.as_bytes()).await, problem(413, "too-large"));

    dc.create(ID, 5).await;
    assert_eq!(dc.create(ID, 6).await.problem(), problem(409, "metadata-conflict"));
}

#[tokio::test]
async fn paths_parameters_and_methods() {
    let dc = Datacenter::start();
    dc.create(ID, 5).await;
    for (request, expected) in [
        ("GET /v1/files/xyz", problem(400, "invalid-id")),
        ("GET /v1/files/0193e4a07b1c7def8123456789abcdef0", problem(400, "invalid-id")),
        ("DELETE /v1/files/%FF", problem(400, "invalid-parameter")),
        ("GET /v1/files/0293e4a0-7b1c-7def-8123-456789abcdef", problem(404, "not-found")),
        ("GET /v1/files?limit=0", problem(400, "invalid-parameter")),
        ("GET /v1/files?limit=1001", problem(400, "invalid-parameter")),
        ("GET /v1/files?limit=x", problem(400, "invalid-parameter")),
        ("GET /v1/files?limits=1", problem(400, "invalid-parameter")),
        ("GET /v1/files?state=done", problem(400, "invalid-parameter")),
        ("GET /v1/files?after=x", problem(400, "invalid-id")),
        (&format!("GET /v1/files/{ID}?wait=dropped"), problem(400, "invalid-parameter")),
        (&format!("GET /v1/files/{ID}?wait=complete&timeout=61"), problem(400, "invalid-parameter")),
        (&format!("GET /v1/files/{ID}/tree?start=1&level=1"), problem(400, "invalid-parameter")),
        (&format!("GET /v1/files/{ID}/tree?level=13"), problem(400, "invalid-parameter")),
        ("GET /", problem(404, "no-route")),
        ("GET /v2/files", problem(404, "no-route")),
        ("GET /v1/files/", problem(404, "no-route")),
        ("PATCH /v1/files", problem(405, "method")),
        (&format!("GET /v1/files/{ID}/chunks/0"), problem(405, "method")),
    ] {
        assert_eq!(dc.ask(request, b"").await.problem(), expected, "{request}");
    }
    let allow = dc.ask("PATCH /v1/files", b"").await;
    assert!(allow.header("allow").is_some_and(|allow| allow.contains("POST")), "{}", allow.head);
    let chunked = format!("Authorization: Bearer {}\r\nTransfer-Encoding: chunked\r\n", dc.token);
    let request = format!("PUT /v1/files/{ID}/chunks/0 HTTP/1.1\r\nHost: x\r\n{chunked}\r\n0\r\n\r\n");
    assert_eq!(dc.raw(&request, b"").await.problem(), problem(411, "length-required"));
    let encoded = format!(
        "Host: x\r\nAuthorization: Bearer {}\r\nContent-Encoding: gzip\r\nContent-Length: 5\r\n",
        dc.token
    );
    for request in [
        format!("PUT /v1/files/{ID}/chunks/0 HTTP/1.1\r\n{encoded}\r\n"),
        format!("POST /v1/files HTTP/1.1\r\n{encoded}File-Metadata: {{}}\r\n\r\n"),
    ] {
        assert_eq!(dc.raw(&request, b"bytes").await.problem(), problem(415, "encoding"), "{request}");
    }
}

#[tokio::test]
async fn tokens_are_refused_before_the_body_and_a_client_that_writes_first_sees_it() {
    let dc = Datacenter::start();
    dc.create(ID, 8 * CHUNK_LEN).await;
    let body = content(8 * CHUNK_LEN);
    let mint = |grant: &TokenGrant| dc.mint.mint(grant, now()).unwrap();
    let expired = {
        let earlier = sluice_engine::ids::Timestamp::new(now().number() - 7_200_000);
        dc.mint.mint(&everything(), earlier).unwrap()
    };
    let revoked = mint(&TokenGrant { tenant: sluice_engine::ids::TenantId::new(8), ..everything() });
    dc.revocations.apply(Revocation {
        tenant: sluice_engine::ids::TenantId::new(8),
        session: None,
        epoch: sluice_engine::ids::RevocationEpoch::new(1),
    });
    let stranger = Datacenter::start();
    let payload = dc.token.split('.').nth(1).unwrap();
    let unsigned = format!("eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0.{payload}.");
    let elsewhere = mint(&TokenGrant { dcs: vec![sluice_engine::ids::DcId::new(2)], ..everything() });
    let reader = mint(&TokenGrant { scopes: vec![sluice_engine::context::Scope::Read], ..everything() });
    for (authorization, expected) in [
        (String::new(), problem(401, "unauthenticated")),
        ("Authorization: Basic YTpi\r\n".into(), problem(401, "invalid-token")),
        ("Authorization: Bearer garbage\r\n".into(), problem(401, "invalid-token")),
        (format!("Authorization: Bearer {}\r\n", stranger.token), problem(401, "invalid-token")),
        (format!("Authorization: Bearer {unsigned}\r\n"), problem(401, "invalid-token")),
        (format!("Authorization: Bearer {expired}\r\n"), problem(401, "expired-token")),
        (format!("Authorization: Bearer {revoked}\r\n"), problem(401, "revoked-token")),
        (format!("Authorization: Bearer {elsewhere}\r\n"), problem(403, "forbidden")),
        (format!("Authorization: Bearer {reader}\r\n"), problem(403, "forbidden")),
    ] {
        let request = head(&format!("PUT /v1/files/{ID}/chunks/0"), &authorization, body.len());
        assert_eq!(dc.raw(&request, &body).await.problem(), expected, "{authorization}");
    }
}

#[tokio::test]
async fn another_tenants_file_is_as_if_it_did_not_exist() {
    let dc = Datacenter::start();
    dc.create(ID, 0).await;
    let other = TokenGrant { tenant: sluice_engine::ids::TenantId::new(8), ..everything() };
    let token = dc.mint.mint(&other, now()).unwrap();
    // Headers that only the inside may set change nothing.
    let headers = format!(
        "Authorization: Bearer {token}\r\nSluice-Context: {0}\r\nX-Sluice-Tenant: 7\r\nSluice-Dc: dc-z\r\n",
        "00".repeat(80)
    );
    for path in ["", "/content", "/tree"] {
        let answer = dc.raw(&head(&format!("GET /v1/files/{ID}{path}"), &headers, 0), b"").await;
        assert_eq!(answer.problem(), problem(404, "not-found"));
        assert_eq!(answer.header("sluice-dc"), Some("dc-a"));
    }
}

#[tokio::test]
async fn a_trace_is_carried_on() {
    let dc = Datacenter::start();
    let trace = "Traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\n";
    let answer = dc.ask_with("GET /v1", trace, b"").await;
    assert_eq!(answer.header("trace-id"), Some("0af7651916cd43dd8448eb211c80319c"));
}

#[tokio::test]
async fn only_an_operator_revokes_and_asks_about_tenants() {
    let dc = Datacenter::start();
    let mint = |scopes| dc.mint.mint(&TokenGrant { scopes, ..everything() }, now()).unwrap();
    let operator = mint(vec![sluice_engine::context::Scope::Operate]);
    let other = mint(vec![sluice_engine::context::Scope::Read]);
    let id = sluice_node::token::UnverifiedToken::read(&other).unwrap().session.uuid();
    let as_who = |token: &str| format!("Authorization: Bearer {token}\r\n");
    let one = format!(r#"{{"tenant":7,"session":"{id}"}}"#);
    let revoke = async |token: &str, body: &str| {
        let headers = as_who(token);
        dc.raw(&head("POST /v1/admin/revocations", &headers, body.len()), body.as_bytes()).await
    };
    let ask = async |token: &str, request: &str| dc.raw(&head(request, &as_who(token), 0), b"").await;

    assert_eq!(revoke(&dc.token, &one).await.problem(), problem(403, "forbidden"));
    assert_eq!(ask(&dc.token, "GET /v1/admin/tenants/7").await.problem(), problem(403, "forbidden"));
    assert_eq!(
        revoke(&operator, r#"{"tenant":7,"all":true}"#).await.problem(),
        problem(400, "invalid-metadata")
    );
    assert_eq!(
        ask(&operator, "GET /v1/admin/tenants/acme").await.problem(),
        problem(400, "invalid-parameter")
    );
    // An operator is no tenant: files are none of its business.
    assert_eq!(ask(&operator, "GET /v1/files").await.problem(), problem(403, "forbidden"));

    assert_eq!(ask(&other, "GET /v1/files").await.status, 200);
    assert_eq!(revoke(&operator, &one).await.status, 200);
    assert_eq!(ask(&other, "GET /v1/files").await.problem(), problem(401, "revoked-token"));
    assert_eq!(ask(&dc.token, "GET /v1/files").await.status, 200, "another token of the tenant");
    let status = ask(&operator, "GET /v1/admin/tenants/7").await;
    assert_eq!(status.status, 200);
    assert!(String::from_utf8_lossy(&status.body).contains(r#""revoked_sessions":1"#));
}
