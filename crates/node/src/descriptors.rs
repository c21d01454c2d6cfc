//! How many files and connections the process may have open.

use rustix::process::{Resource, getrlimit, setrlimit};

/// Lets the process open as many as its user may: the default, often 1,024, is meant for programs that do not serve.
/// What the system does not grant stays as it was; a server without descriptors waits for some to be given back.
pub fn raise_descriptors() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!(%error, "the number of open files stays limited");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_what_the_user_may_have() {
        raise_descriptors();
        let limit = getrlimit(Resource::Nofile);
        assert_eq!(limit.current, limit.maximum);
    }
}
