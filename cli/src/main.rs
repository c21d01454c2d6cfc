//! `sluice`: the command line.
//!
//! Arguments become one [`app::Cli`]; each subcommand is a module with its `Args` and its `run`. What fails ends in
//! [`failure`], which alone writes errors and chooses the exit code.

mod app;
mod command;
mod config;
mod context;
mod demo;
mod dev;
mod failure;
mod fsck;
mod get;
mod ls;
mod progress;
mod put;
mod rm;
mod settings;
mod signals;
mod size;
mod status;

/// The system's allocator keeps what its many arenas once held; this one gives it back, which is what keeps a server's
/// memory in its budget.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    app::main()
}
