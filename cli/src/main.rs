//! `sluice`: the command line.
//!
//! Arguments become one [`app::Cli`]; each subcommand is a module with its `Args` and its `run`. What fails ends in
//! [`failure`], which alone writes errors and chooses the exit code.

mod admin;
mod app;
mod certificates;
mod command;
mod config;
mod context;
mod dc;
mod demo;
mod dev;
mod failure;
mod fsck;
mod get;
mod kept;
mod length;
mod ls;
mod peers;
mod progress;
mod put;
mod reload;
mod rm;
mod role;
mod settings;
mod signals;
mod size;
mod status;

/// Memory in proportion to what is in use, not to the number of threads that once used it: two arenas for all, pages
/// given back after a moment. `.cargo/config.toml` says so to its build; `_RJEM_MALLOC_CONF` overrides it at run time.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> std::process::ExitCode {
    app::main()
}
