//! `sluice command`: the 160-byte commands between datacenters, in words.

use std::io::Read;

use anyhow::Context as _;
use serde_json::{Value, json};
use sluice_engine::command::{BODY_LEN, COMMAND_LEN, Command};
use sluice_engine::ids::{DcId, FileId, KeyId};
use sluice_engine::keys::{ClusterTag, KeyRing, PublicKey, Purpose};

use crate::context::Context;
use crate::failure::Failure;

const EXAMPLES: &str = "\
Examples:
  sluice command decode 534c4301…              320 hexadecimal digits
  sluice command decode - < command.bin        160 bytes, or their digits
  sluice command decode 534c4301… --key 9f3a… --cluster prod";

/// What to do with a command.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Action {
    /// Say in words what 160 bytes say, and with a key whether the signature holds.
    #[command(after_help = EXAMPLES)]
    Decode {
        /// The command in hexadecimal; - to read it from standard input.
        command: String,

        /// The sender's public key, 64 hexadecimal digits.
        #[arg(long, value_name = "HEX", requires = "cluster", value_parser = public_key)]
        key: Option<[u8; 32]>,

        /// Name of the cluster that the signature is bound to.
        #[arg(long, value_name = "NAME", requires = "key")]
        cluster: Option<String>,
    },
}

fn public_key(text: &str) -> Result<[u8; 32], String> {
    let mut bytes = [0; 32];
    hex::decode_to_slice(text, &mut bytes).map_err(|_| "expected 64 hexadecimal digits".to_owned())?;
    Ok(bytes)
}

/// Does it.
pub(crate) fn run(action: Action, context: &Context) -> anyhow::Result<()> {
    match action {
        Action::Decode { command, key, cluster } => {
            let bytes = if command == "-" { stdin()? } else { digits(&command)? };
            let (command, key_id) = Command::decode(&bytes).map_err(|error| {
                Failure::usage("invalid-command", error.to_string(), "see the table of fields in DESIGN.md")
            })?;
            let holds = key.zip(cluster).map(|(key, cluster)| holds(&bytes, &command, key_id, key, &cluster));
            context.answer(&object(&command, key_id, holds), || words(&command, key_id, holds))?;
            match holds {
                Some(false) => {
                    let message = format!("the signature of key {key_id} does not hold");
                    Err(Failure::Integrity { code: "signature", message }.into())
                }
                Some(true) | None => Ok(()),
            }
        }
    }
}

fn stdin() -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    // Digits and white space take a little over twice the bytes; what is longer is no command.
    let limit = 4 * COMMAND_LEN as u64;
    std::io::stdin().lock().take(limit).read_to_end(&mut bytes).context("cannot read standard input")?;
    match std::str::from_utf8(&bytes) {
        Ok(text) if bytes.len() != COMMAND_LEN => digits(text),
        Ok(_) | Err(_) => Ok(bytes),
    }
}

fn digits(text: &str) -> anyhow::Result<Vec<u8>> {
    let text: String = text.chars().filter(|c| !c.is_whitespace()).collect();
    hex::decode(&text).map_err(|error| {
        let message = format!("expected {} hexadecimal digits: {error}", 2 * COMMAND_LEN);
        Failure::usage("invalid-command", message, "or give - and the bytes on standard input").into()
    })
}

fn holds(bytes: &[u8], command: &Command, key_id: KeyId, key: [u8; 32], cluster: &str) -> bool {
    let public = PublicKey { dc: command.from, bytes: key };
    let ring = KeyRing::new(Purpose::Command, ClusterTag::of_name(cluster), [(key_id, public)]);
    ring.verify(key_id, command.from, &bytes[..BODY_LEN], &bytes[BODY_LEN..]).is_ok()
}

fn sent_at(command: &Command) -> String {
    let moment =
        std::time::UNIX_EPOCH.checked_add(std::time::Duration::from_millis(command.sent_at.number()));
    match moment {
        Some(moment) => humantime::format_rfc3339_millis(moment).to_string(),
        None => format!("{} ms after 1970", command.sent_at),
    }
}

fn object(command: &Command, key: KeyId, holds: Option<bool>) -> Value {
    let to = if command.to == DcId::EVERY { json!("every") } else { json!(command.to.number()) };
    json!({
        "kind": command.statement.kind().name(),
        "says": command.statement.to_string(),
        "from": command.from.number(),
        "to": to,
        "file": command.file.to_string(),
        "slot": command.slot.number(),
        "sequence": command.sequence.number(),
        "incarnation": command.sequence.incarnation().number(),
        "sent_at": sent_at(command),
        "key": key.number(),
        "signature_holds": holds,
    })
}

fn words(command: &Command, key: KeyId, holds: Option<bool>) -> String {
    let sequence = command.sequence;
    let file = if command.file == FileId::NIL { "none".to_owned() } else { command.file.to_string() };
    let signature = match holds {
        Some(true) => "holds",
        Some(false) => "does not hold",
        None => "not checked: give --key and --cluster",
    };
    format!(
        "kind       {}\nsays       {}\nfrom       {}\nto         {}\nfile       {file}\nslot       {}\n\
         sequence   {} (incarnation {}, number {})\nsent at    {}\nkey        {key}\nsignature  {signature}\n",
        command.statement.kind(),
        command.statement,
        command.from,
        command.to,
        command.slot.number(),
        sequence.number(),
        sequence.incarnation(),
        sequence.number() & u64::from(u32::MAX),
        sent_at(command),
    )
}
