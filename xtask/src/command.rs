//! Running other programs: quiet when they succeed, all they said when they fail.

use std::ffi::OsStr;
use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::wait;

/// A line of progress. It goes to standard error, so that standard output stays free for results.
pub fn progress(text: &str) {
    eprintln!("  {text}");
}

/// A headline of progress.
pub fn headline(text: &str) {
    eprintln!("==> {text}");
}

/// A command from its words.
pub fn command<S: AsRef<OsStr>>(program: S, arguments: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(arguments);
    command
}

/// Runs a command and returns its standard output; on failure its standard error is the message.
pub fn output(command: &mut Command) -> Result<String> {
    let shown = shown(command);
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("cannot start `{shown}`"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("`{shown}` failed ({}): {}", output.status, said.trim());
    }
    String::from_utf8(output.stdout).with_context(|| format!("`{shown}` answered something that is not text"))
}

/// Runs a command for its effect.
pub fn run(command: &mut Command) -> Result<()> {
    output(command).map(drop)
}

/// Whether a command can be started and succeeds.
pub fn succeeds(command: &mut Command) -> bool {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// Runs a command that takes minutes: what it says goes to `log`, every 20 s a line shows that it still works.
pub fn run_long(what: &str, command: &mut Command, log: &Path) -> Result<()> {
    if let Some(directory) = log.parent() {
        std::fs::create_dir_all(directory).with_context(|| format!("cannot create {}", directory.display()))?;
    }
    let file = File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
    let errors = file.try_clone().context("cannot open the log twice")?;
    let shown = shown(command);
    let start = wait::now();
    progress(what);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(file)
        .stderr(errors)
        .spawn()
        .with_context(|| format!("cannot start `{shown}`"))?;
    let mut said = 0;
    // Not bounded here: a cold build takes as long as the machine needs, the caller sees the lines and can stop it.
    let status = loop {
        if let Some(status) = child.try_wait().with_context(|| format!("cannot wait for `{shown}`"))? {
            break status;
        }
        let elapsed = start.elapsed().as_secs();
        if elapsed >= said + 20 {
            said = elapsed;
            progress(&format!("  … {elapsed} s"));
        }
        std::thread::sleep(Duration::from_millis(100));
    };
    if !status.success() {
        bail!("`{shown}` failed ({status}), the end of {}:\n{}", log.display(), tail(log, 30));
    }
    Ok(())
}

/// The last lines of a log.
pub fn tail(log: &Path, lines: usize) -> String {
    let Ok(bytes) = std::fs::read(log) else { return format!("({} cannot be read)", log.display()) };
    let text = String::from_utf8_lossy(&bytes);
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

fn shown(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|word| word.to_string_lossy().into_owned()));
    let line = words.join(" ");
    // A build line is long; its beginning says which one it is.
    match line.char_indices().nth(200) {
        Some((end, _)) => format!("{} …", &line[..end]),
        None => line,
    }
}
