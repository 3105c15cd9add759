//! Calls with the unmodified `gradio_client`, in a Python of its own.

use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;
use serde_json::Value;

use crate::kubectl::setting;

/// What the client saw.
#[derive(Clone, Debug, Deserialize)]
pub struct Answer {
    /// What the function returned.
    #[serde(default)]
    pub result: Value,
    /// Or how the call failed.
    pub error: Option<CallError>,
    /// Seconds from the call to its answer.
    pub seconds: f64,
}

/// A failed call as the client reports it.
#[derive(Clone, Debug, Deserialize)]
pub struct CallError {
    /// Python class.
    #[serde(rename = "type")]
    pub class: String,
    /// Title of the message, as gradio sends it.
    pub title: Option<String>,
    /// The message.
    pub message: String,
}

/// A call under way; ended when dropped, as a visitor who closes the page.
#[derive(Debug)]
pub(crate) struct Call(Child);

impl Call {
    pub(crate) fn start(url: &str, api_name: &str, token: Option<&str>, arguments: &[&str]) -> Result<Self> {
        let mut command = Command::new(setting("SPACEPORT_CLIENT_PYTHON")?);
        command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/clients/call.py")).arg(url).arg(api_name).args(arguments);
        command.env("HF_HUB_DISABLE_TELEMETRY", "1").env("GRADIO_ANALYTICS_ENABLED", "False");
        // The token goes through the environment: arguments are visible to every process of the machine.
        if let Some(token) = token {
            command.env("SPACEPORT_TOKEN", token);
        }
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot start the Python with gradio_client")?;
        Ok(Self(child))
    }

    pub(crate) fn answer(mut self) -> Result<Answer> {
        let read = |stream: Option<&mut dyn std::io::Read>| -> Result<String> {
            let mut text = String::new();
            if let Some(stream) = stream {
                stream.read_to_string(&mut text)?;
            }
            Ok(text)
        };
        // The client prints one line at its end and little else, so that reading one stream after the other cannot block it.
        let text = read(self.0.stdout.as_mut().map(|stream| stream as &mut dyn std::io::Read))?;
        let errors = read(self.0.stderr.as_mut().map(|stream| stream as &mut dyn std::io::Read))?;
        let status = self.0.wait()?;
        if !status.success() {
            bail!("the client ended with {status}: {errors}");
        }
        let line = text.lines().last().unwrap_or_default();
        serde_json::from_str(line).with_context(|| format!("the client printed {text:?} and {errors:?}"))
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        // Already ended if `answer` took it; otherwise the visitor leaves. Both calls fail only on an ended child.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
