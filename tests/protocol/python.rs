//! The second implementation, in Python, checks the vectors; and notices when one of them is wrong.

use std::process::{Command, Output};

use serde_json::Value;

use crate::interpreter::{interpreter, root};

fn check(interpreter: &str, arguments: &[&str]) -> Output {
    let script = root().join("tests/python/check_vectors.py");
    Command::new(interpreter).arg(script).args(arguments).output().unwrap()
}

#[test]
fn another_implementation_agrees_with_every_vector() {
    let checked = check(&interpreter(), &[]);
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
    println!("{}", String::from_utf8_lossy(&checked.stdout));
}

/// Changes the first text of hexadecimal digits, or the first number if there is none.
fn spoil(value: &mut Value) -> bool {
    spoil_text(value) || spoil_number(value)
}

fn children(value: &mut Value) -> Vec<&mut Value> {
    match value {
        Value::Array(values) => values.iter_mut().collect(),
        Value::Object(values) => values.values_mut().collect(),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => Vec::new(),
    }
}

fn spoil_text(value: &mut Value) -> bool {
    if let Value::String(text) = value
        && text.len() >= 32
        && text.bytes().all(|byte| byte.is_ascii_hexdigit())
    {
        let last = if text.ends_with('0') { "1" } else { "0" };
        text.replace_range(text.len() - 1.., last);
        return true;
    }
    children(value).into_iter().any(spoil_text)
}

fn spoil_number(value: &mut Value) -> bool {
    if let Some(number) = value.as_u64() {
        *value = Value::from(number ^ 1);
        return true;
    }
    children(value).into_iter().any(spoil_number)
}

#[test]
fn a_wrong_vector_of_any_section_is_noticed() {
    let interpreter = interpreter();
    let text = std::fs::read_to_string(root().join("docs/vectors.json")).unwrap();
    let vectors: Value = serde_json::from_str(&text).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let sections: Vec<String> = vectors.as_object().unwrap().keys().cloned().collect();
    let path = directory.path().join("wrong.json");
    let notices = |wrong: &Value, section: &str| {
        std::fs::write(&path, wrong.to_string()).unwrap();
        let checked = check(&interpreter, &[path.to_str().unwrap(), section]);
        let said = String::from_utf8_lossy(&checked.stderr);
        let named = said.contains("expected") || said.contains("Refused");
        assert!(checked.status.code() == Some(1) && named, "{section}: {said}");
    };
    for section in sections.iter().filter(|name| !["about", "version"].contains(&name.as_str())) {
        let mut wrong = vectors.clone();
        // What is refused would be refused all the same.
        let holds = !wrong[section]["valid"].is_null();
        let place = if holds { &mut wrong[section]["valid"] } else { &mut wrong[section] };
        assert!(spoil(place), "{section}");
        notices(&wrong, if section == "keys" { "commands" } else { section });
        if !vectors[section]["invalid"].is_null() {
            let mut wrong = vectors.clone();
            wrong[section]["invalid"][0]["error"] = "another".into();
            notices(&wrong, section);
        }
    }
}
