//! What needs no cluster: settings, commands in words, help.

use sluice_engine::command::{Command, Statement};
use sluice_engine::ids::{ClientFileId, DcId, FileId, Incarnation, KeyId, Sequence, TenantId, Timestamp};
use sluice_engine::keys::{ClusterTag, Purpose, SigningKey};

use crate::Home;

fn example() -> (String, String) {
    let tag = ClusterTag::of_name("prod");
    let key = SigningKey::from_seed(Purpose::Command, tag, DcId::new(1), KeyId::new(7), &[3; 32]).unwrap();
    let client: ClientFileId = "0193e4a0-7b1c-7def-8123-456789abcdef".parse().unwrap();
    let file = FileId::derive(TenantId::new(1), client);
    let command = Command {
        from: DcId::new(1),
        to: DcId::EVERY,
        sequence: Sequence::of(Incarnation::new(3), 4),
        slot: file.slot(),
        sent_at: Timestamp::new(1_763_640_000_123),
        file,
        statement: Statement::MetaRequest,
    };
    (hex(&command.sign(&key)), hex(&key.public().bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[tokio::test]
async fn a_command_is_told_in_words() {
    let home = Home::new(None);
    let (command, key) = example();
    let told = home.run(&["command", "decode", &command]).await;
    assert_eq!(told.code, Some(0), "{}", told.stderr);
    for line in [
        "kind       META_REQUEST",
        "from       dc#1",
        "to         every dc",
        "file       8e415f9f-b3bf-8dfe-98f9-1e736bec61c8",
        "(incarnation 3, number 4)",
        "sent at    2025-11-20T12:00:00.123Z",
        "key        7",
        "signature  not checked",
    ] {
        assert!(told.stdout.contains(line), "{line}: {}", told.stdout);
    }
    let held = home.run(&["command", "decode", &command, "--key", &key, "--cluster", "prod", "--json"]).await;
    assert_eq!((held.code, &held.json()["signature_holds"]), (Some(0), &true.into()));
    let foreign = home.run(&["command", "decode", &command, "--key", &key, "--cluster", "test"]).await;
    assert_eq!(foreign.code, Some(5));
    assert!(foreign.stdout.contains("signature  does not hold"));
    assert!(foreign.stderr.contains("(signature)"));
}

#[tokio::test]
async fn bad_commands_get_the_named_error() {
    let home = Home::new(None);
    let (command, _) = example();
    for (bad, message) in [
        (command[..318].to_owned(), "a command has 160 bytes, got 159"),
        (command.replacen("534c43", "534c44", 1), "expected the magic SLC"),
        ("xyz".to_owned(), "expected 320 hexadecimal digits"),
    ] {
        let refused = home.run(&["command", "decode", &bad]).await;
        assert_eq!(refused.code, Some(2));
        assert!(refused.stderr.contains(message), "{}", refused.stderr);
        assert!(refused.stderr.contains("(invalid-command)"), "{}", refused.stderr);
    }
}

#[tokio::test]
async fn arguments_that_make_no_sense_are_refused_in_words_and_as_an_object() {
    let home = Home::new(None);
    let refused = home.run(&["put", "--json", "--jbos", "3"]).await;
    assert_eq!(refused.code, Some(2));
    assert!(refused.stderr.starts_with("error: unexpected argument '--jbos' found"), "{}", refused.stderr);
    let error = &refused.json()["error"];
    assert_eq!((&error["code"], &error["exit"]), (&"usage".into(), &2.into()));
    assert!(error["message"].as_str().unwrap().starts_with("unexpected argument '--jbos' found"), "{error}");
    let help = home.run(&["put", "--json", "--help"]).await;
    assert_eq!((help.code, help.stderr.as_str()), (Some(0), ""));
    assert!(help.stdout.contains("Usage: sluice put"), "{}", help.stdout);

    let no_file = home.run(&["demo", "."]).await;
    assert_eq!(no_file.code, Some(2), "{}", no_file.stderr);
}

#[tokio::test]
async fn settings_say_where_they_come_from() {
    let home = Home::new(None);
    let file = home.path("config/sluice/config.toml");
    std::fs::create_dir_all(file.parent().unwrap()).unwrap();
    std::fs::write(&file, "url = \"https://file\"\nca = \"/file/ca\"\njobs = 3\n").unwrap();
    let shown = home.run(&["config", "show", "--url", "https://flag"]).await;
    assert_eq!(shown.code, Some(0), "{}", shown.stderr);
    let line = |key: &str| shown.stdout.lines().find(|line| line.starts_with(key)).unwrap().to_owned();
    assert!(line("url").contains("https://flag   (--url)"), "{}", shown.stdout);
    assert!(line("ca").ends_with("ca.pem   (SLUICE_CA)"), "{}", shown.stdout);
    assert!(line("jobs").ends_with("config.toml)"), "{}", shown.stdout);
    assert!(line("retry_for").ends_with("5min   (default)"), "{}", shown.stdout);
    let ok = home.run(&["config", "check", file.to_str().unwrap()]).await;
    assert_eq!(ok.code, Some(0));

    std::fs::write(&file, "jobs = 3\nurls = \"x\"\n").unwrap();
    for args in [vec!["config", "check", file.to_str().unwrap()], vec!["ls"]] {
        let refused = home.run(&args).await;
        assert_eq!(refused.code, Some(2));
        assert!(refused.stderr.contains("config.toml:2: unknown field `urls`"), "{}", refused.stderr);
    }
}

#[tokio::test]
async fn what_is_missing_is_asked_for() {
    let home = Home::new(None);
    let refused = home.run(&["ls"]).await;
    assert_eq!(refused.code, Some(2));
    assert_eq!(
        refused.stderr,
        "error: the URL of the cluster is not configured (configuration)\n\
         hint: give --url, set SLUICE_URL, or write it to the configuration file\n"
    );
    assert_eq!(home.run(&["frobnicate"]).await.code, Some(2));
    let help = home.run(&["put", "--help"]).await;
    assert_eq!(help.code, Some(0));
    assert!(help.stdout.contains("Examples:"));
}
