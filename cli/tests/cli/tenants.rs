//! Tokens and tenants, as who runs a cluster has them in hand: minted, shown, limited, and ended.

use crate::Ended;
use crate::fake::noise;
use crate::processes::{Site, done, eventually};

const MIB: usize = 1 << 20;

impl Site {
    /// Makes a token in a file of this name.
    fn mint(&self, name: &str, args: &[&str]) -> Ended {
        let mint = ["admin", "token", "mint", "--keys", "keys/authority", "--out", name];
        self.home.command(&[&mint[..], args].concat()).output().unwrap().into()
    }

    /// Runs a command at a datacenter with the token in this file.
    fn run_with(&self, token: &str, url: usize, args: &[&str]) -> Ended {
        self.run(url, &[args, &["--token-file", token]].concat())
    }
}

/// That a command was refused with this exit code, and with these words.
#[track_caller]
fn refused(ended: &Ended, code: i32, words: &[&str]) {
    assert_eq!(ended.code, Some(code), "{}", ended.stderr);
    for words in words {
        assert!(ended.stderr.contains(words), "{words}: {}", ended.stderr);
    }
}

#[test]
fn a_token_says_what_it_was_minted_with_and_wrong_arguments_mint_none() {
    let site = Site::new(&["dc-a", "dc-b"]);
    let run = |args: &[&str]| -> Ended { site.home.command(args).output().unwrap().into() };
    let what = [
        &["--tenant", "9", "--name", "alice", "--scope", "write", "--scope", "read"][..],
        &["--quota", "3MiB", "--quota-files", "4", "--rate", "50MiB", "--dc", "dc-b", "--life", "1h"],
    ];
    done(site.mint("alice", &what.concat()));
    let shown = done(run(&["admin", "token", "show", "alice", "--keys", "keys/dc-a"]));
    for line in [
        "cluster    test",
        "tenant     9 alice",
        "scopes     write, read",
        "quota      3 MiB",
        "files      4",
        "rate       50 MiB a second",
        "dcs        dc#2",
        "signature  holds, and the token counts now",
    ] {
        assert!(shown.lines().any(|shown| shown == line), "{line}: {shown}");
    }
    let token = std::fs::read_to_string(site.home.path("alice")).unwrap();
    assert!(!shown.contains(token.trim()), "the token itself is not printed");
    let shown = run(&["admin", "token", "show", "alice", "--json"]).json();
    for (name, value) in [
        ("cluster", serde_json::json!("test")),
        ("tenant", 9.into()),
        ("name", "alice".into()),
        ("scopes", serde_json::json!(["write", "read"])),
        ("quota", (3 * MIB).into()),
        ("quota_files", 4.into()),
        ("rate", (50 * MIB).into()),
        ("dcs", serde_json::json!([2])),
        ("signature", "not checked: give --keys".into()),
    ] {
        assert_eq!(shown[name], value, "{name}: {shown}");
    }
    assert_eq!(shown["ends"].as_u64().unwrap() - shown["begins"].as_u64().unwrap(), 3600);
    let shown = done(run(&["admin", "token", "show", "token"]));
    for line in
        ["scopes     write, read, delete", "quota      no limit", "rate       no limit", "dcs        all"]
    {
        assert!(shown.lines().any(|shown| shown == line), "{line}: {shown}");
    }

    for (args, words) in [
        (&["--quota", "nonsense"][..], &["--quota", "expected a size such as", "--help"][..]),
        (&["--rate", "1.5MiB"], &["--rate", "expected a size such as", "--help"]),
        (&["--quota-files", "many"], &["--quota-files", "--help"]),
        (&["--scope", "nonsense"], &["--scope", "expected one of write, read, delete", "--help"]),
        // That is what --operator is for.
        (&["--scope", "operate"], &["--scope", "expected one of write, read, delete", "--help"]),
        (&["--operator"], &["--operator", "--help"]),
        (&["--life", "0"], &["life is \"0\"", "(duration)\nhint: such as"]),
        (&["--life", "999ms"], &["life is \"999ms\"", "(duration)\nhint: such as"]),
        (&["--life", "long"], &["life is \"long\"", "(duration)\nhint: such as"]),
        (&["--dc", "dc-z"], &["no datacenter is called \"dc-z\" (dc)\nhint: the cluster has dc-a, dc-b"]),
    ] {
        refused(&site.mint("none", &[&["--tenant", "9"], args].concat()), 2, words);
        assert!(!site.home.path("none").exists(), "{args:?}");
    }
    refused(&site.mint("none", &[]), 2, &["--tenant"]);
    let none = run(&["admin", "token", "show", "ca.pem"]);
    refused(&none, 2, &["(token)\nhint: give the file that `sluice admin token mint` wrote"]);
}

#[test]
fn tokens_bound_what_they_allow_and_an_operator_ends_them_everywhere() {
    let site = Site::new(&["dc-a", "dc-b"]);
    let (a, b) = (site.start("dc-a"), site.start("dc-b"));
    for (name, args) in [
        ("operator", &["--operator", "--life", "1h"][..]),
        ("reader", &["--tenant", "9", "--scope", "read"]),
        ("limited", &["--tenant", "9", "--quota", "1MiB"]),
        ("one", &["--tenant", "9", "--quota-files", "1"]),
        ("local", &["--tenant", "9", "--dc", "dc-a"]),
    ] {
        done(site.mint(name, args));
    }
    site.home.write("small", &noise(1, 999));
    site.home.write("large", &noise(2, 2 * MIB));

    // What a token does not allow is refused by name.
    let scope = site.run_with("reader", 0, &["put", "small"]);
    refused(&scope, 4, &["(forbidden)", "hint: use a token with the scope write"]);
    refused(&site.run_with("limited", 0, &["put", "large"]), 4, &["(quota)"]);
    refused(
        &site.run_with("local", 1, &["ls"]),
        4,
        &["(forbidden)", "hint: use a datacenter that the token allows"],
    );
    let id = done(site.run_with("limited", 0, &["put", "small"])).trim_end().to_owned();
    refused(
        &site.run_with("one", 0, &["put", "small"]),
        4,
        &["1 of 1 files are in this datacenter", "(quota)"],
    );
    done(site.run_with("reader", 0, &["get", &id, "-o", "copy"]));
    assert!(std::fs::read(site.home.path("copy")).unwrap() == noise(1, 999));

    // Only an operator sees tenants and ends tokens, and reads no file.
    let show = ["admin", "tenant", "show", "9"];
    for args in [&show[..], &["admin", "tenant", "revoke", "9"], &["admin", "token", "revoke", "one"]] {
        refused(&site.run_with("limited", 0, args), 4, &["(forbidden)"]);
    }
    refused(&site.run_with("operator", 0, &["ls"]), 4, &["(forbidden)"]);
    let shown = done(site.run_with("operator", 0, &show));
    for line in
        ["tenant    9   says dc-a", "stored    999 bytes", "files     1", "revoked   none, and 0 one by one"]
    {
        assert!(shown.lines().any(|shown| shown == line), "{line}: {shown}");
    }

    // One token by its file, one by its id, and the others go on.
    let is_revoked = |token: &str, url: usize| {
        let ended = site.run_with(token, url, &["ls"]);
        (ended.code != Some(0)).then(|| refused(&ended, 4, &["(revoked-token)"]))
    };
    let revoked = done(site.run_with("operator", 0, &["admin", "token", "revoke", "one"]));
    assert!(revoked.starts_with("revoked   token ") && revoked.contains("by        dc-a"), "{revoked}");
    let shown: Ended =
        site.home.command(&["admin", "token", "show", "reader", "--json"]).output().unwrap().into();
    let reader = shown.json()["id"].as_str().unwrap().to_owned();
    let by_id = ["admin", "token", "revoke", "--tenant", "9", "--id", &reader, "--json"];
    assert_eq!(site.run_with("operator", 0, &by_id).json()["session"], reader.as_str());
    for token in ["one", "reader"] {
        assert!(is_revoked(token, 0).is_some(), "at once where it was said");
        eventually("word of it", || is_revoked(token, 1));
    }
    done(site.run_with("limited", 0, &["ls"]));
    let shown = site.run_with("operator", 0, &[&show[..], &["--json"]].concat()).json();
    assert_eq!((&shown["revoked_sessions"], &shown["revoked_before"]), (&2.into(), &0.into()));

    // All of the tenant, but for what is minted afterwards, and nobody else's.
    let revoked = done(site.run_with("operator", 1, &["admin", "tenant", "revoke", "9"]));
    assert!(revoked.starts_with("revoked   all tokens of tenant 9 from before "), "{revoked}");
    assert!(is_revoked("limited", 1).is_some(), "at once where it was said");
    eventually("word of it", || is_revoked("limited", 0));
    done(site.mint("newer", &["--tenant", "9"]));
    for url in 0..2 {
        done(site.run_with("newer", url, &["ls"]));
        done(site.run(url, &["ls"]));
    }
    let shown = done(site.run_with("operator", 0, &show));
    assert!(shown.contains("revoked   those minted before "), "{shown}");
    a.stop();
    b.stop();
}
